"""Nemotron-H without experts: each block is one norm and one mixer.

A Mamba 2 mixer, attention without RoPE, or an MLP without a gate, of squared ReLU.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from lrquant.architectures import Architecture, decoder, mamba
from lrquant.architectures.matrix import Matrix, linears
from lrquant.architectures.sites import (
    Site,
    norm_site,
    query_key_site,
    up_down_site,
    value_output_site,
)

_MIXER, _NORM = "mixer", "norm"
_QUERY, _KEY, _VALUE, _OUTPUT = (f"{_MIXER}.{name}_proj" for name in "qkvo")
_UP, _DOWN = f"{_MIXER}.up_proj", f"{_MIXER}.down_proj"
_LINEARS = {
    "linear_attention": mamba.names(_MIXER),
    "full_attention": (_QUERY, _KEY, _VALUE, _OUTPUT),
    "mlp": (_UP, _DOWN),
}


def _matrices(config: PretrainedConfig, block: int) -> tuple[Matrix, ...]:
    return linears(*_LINEARS[config.layers_block_type[block]])


def _kept(config: PretrainedConfig, block: int) -> tuple[str, ...]:
    is_mamba = config.layers_block_type[block] == "linear_attention"
    return mamba.kept(_MIXER) if is_mamba else ()


def _sites(config: PretrainedConfig, block: int) -> tuple[Site, ...]:
    kind = config.layers_block_type[block]
    *readers, _ = _LINEARS[kind]
    norm = norm_site(_NORM, tuple(readers), config.hidden_size)
    if kind == "linear_attention":
        width = config.mamba_num_heads * config.mamba_head_dim
        return norm, mamba.norm_site(_MIXER, width)
    if kind == "mlp":
        return norm, up_down_site(_UP, _DOWN, config.intermediate_size, power=2)
    shape = decoder.head_shape(config)
    return (
        norm,
        value_output_site(_VALUE, _OUTPUT, *shape),
        query_key_site(_QUERY, _KEY, *shape, rotary=None),
    )


def _refusal(config: PretrainedConfig) -> str | None:
    kinds = list(config.layers_block_type)
    if "moe" in kinds:
        block = kinds.index("moe")
        return f"block {block} has experts, which this family's declaration does not cover yet"
    return None


ARCHITECTURE = Architecture(
    name="nemotron_h",
    model_types=("nemotron_h",),
    blocks="model.layers",
    matrices=_matrices,
    sites=_sites,
    kept=_kept,
    assumes={"mlp_hidden_act": ("relu2",)},
    refusal=_refusal,
)
