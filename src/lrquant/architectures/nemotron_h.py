"""Nemotron-H and Nemotron 3: each block is one norm and one mixer.

A Mamba 2 mixer, attention without RoPE, or an MLP without a gate, of squared ReLU, or experts of
that kind with one more for all, which may read and give channels of a lower rank.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from lrquant.architectures import Architecture, decoder, mamba
from lrquant.architectures.matrix import Matrix, linears
from lrquant.architectures.mixture import Mixture
from lrquant.architectures.sites import (
    Site,
    norm_site,
    query_key_site,
    up_down_site,
    value_output_site,
)

_MIXER, _NORM, _SPARSE = "mixer", "norm", "moe"
_QUERY, _KEY, _VALUE, _OUTPUT = (f"{_MIXER}.{name}_proj" for name in "qkvo")
_UP, _DOWN = f"{_MIXER}.up_proj", f"{_MIXER}.down_proj"
_LINEARS = {
    "linear_attention": mamba.names(_MIXER),
    "full_attention": (_QUERY, _KEY, _VALUE, _OUTPUT),
    "mlp": (_UP, _DOWN),
}


def _mixture(config: PretrainedConfig) -> Mixture:
    return Mixture(
        config.n_routed_experts,
        config.moe_intermediate_size,
        path=_MIXER,
        names=("up_proj", "down_proj"),
        shared="shared_experts",
        shared_width=config.moe_shared_expert_intermediate_size,
        power=2,
        latent=config.moe_latent_size,
        entrance="fc1_latent_proj",
        exit="fc2_latent_proj",
    )


def _matrices(config: PretrainedConfig, block: int) -> tuple[Matrix, ...]:
    kind = config.layers_block_type[block]
    if kind == _SPARSE:
        return _mixture(config).matrices(config.hidden_size)
    return linears(*_LINEARS[kind])


def _kept(config: PretrainedConfig, block: int) -> tuple[str, ...]:
    kind = config.layers_block_type[block]
    if kind == _SPARSE:
        return _mixture(config).kept_weights
    return mamba.kept(_MIXER) if kind == "linear_attention" else ()


def _sites(config: PretrainedConfig, block: int) -> tuple[Site, ...]:
    kind = config.layers_block_type[block]
    if kind == _SPARSE:
        own = _mixture(config)
        return own.norm_site(_NORM, config.hidden_size), *own.inner_sites
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


ARCHITECTURE = Architecture(
    name="nemotron_h",
    model_types=("nemotron_h",),
    blocks="model.layers",
    matrices=_matrices,
    sites=_sites,
    kept=_kept,
    assumes={"mlp_hidden_act": ("relu2",)},
    cumulative=True,
)
