"""Granite 4: Mamba 2 mixers with attention in some blocks, gate and up fused.

Where there are experts the MLP, which every token goes through, stands beside them.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from lrquant.architectures import Architecture, decoder, mamba
from lrquant.architectures.matrix import Matrix, fused_linear, linear, linears
from lrquant.architectures.mixture import Mixture
from lrquant.architectures.sites import (
    Site,
    norm_site,
    query_key_site,
    up_down_site,
    value_output_site,
)

_MIXER, _OUTPUT = "mamba", "self_attn.o_proj"
_GATE_UP, _DOWN = "shared_mlp.input_linear", "shared_mlp.output_linear"


def _is_mamba(config: PretrainedConfig, block: int) -> bool:
    return bool(config.layers_block_type[block] == "linear_attention")


def _matrices(config: PretrainedConfig, block: int) -> tuple[Matrix, ...]:
    attention = *decoder.ATTENTION_INPUTS, _OUTPUT
    mixer = mamba.names(_MIXER) if _is_mamba(config, block) else attention
    width = config.shared_intermediate_size
    mlp = *fused_linear(_GATE_UP, gate=width, up=width), linear(_DOWN)
    own = _mixture(config)
    return (*linears(*mixer), *mlp, *(own.matrices(config.hidden_size) if own else ()))


def _mixture(config: PretrainedConfig) -> Mixture | None:
    count, width = config.num_local_experts, config.intermediate_size
    return Mixture(count, width, path="block_sparse_moe", router="router") if count else None


def _kept(config: PretrainedConfig, block: int) -> tuple[str, ...]:
    own = _mixture(config)
    mixer = mamba.kept(_MIXER) if _is_mamba(config, block) else ()
    return *mixer, *(own.kept_weights if own else ())


def _sites(config: PretrainedConfig, block: int) -> tuple[Site, ...]:
    gate, up = f"{_GATE_UP}.gate", f"{_GATE_UP}.up"
    own = _mixture(config)
    readers = (gate, up, *(own.readers if own else ()))
    return (
        *_mixer_sites(config, block),
        norm_site("post_attention_layernorm", readers, config.hidden_size, measured=_GATE_UP),
        up_down_site(up, _DOWN, config.shared_intermediate_size),
        *(own.inner_sites if own else ()),
    )


def _mixer_sites(config: PretrainedConfig, block: int) -> tuple[Site, ...]:
    if _is_mamba(config, block):
        width = int(config.mamba_expand * config.hidden_size)
        norm = norm_site("input_layernorm", (f"{_MIXER}.in_proj",), config.hidden_size)
        return norm, mamba.norm_site(_MIXER, width)
    shape = decoder.head_shape(config)
    rotary = "half" if config.position_embedding_type == "rope" else None
    query, key, value = decoder.ATTENTION_INPUTS
    return (
        norm_site("input_layernorm", decoder.ATTENTION_INPUTS, config.hidden_size),
        value_output_site(value, _OUTPUT, *shape),
        query_key_site(query, key, *shape, rotary=rotary),
    )


ARCHITECTURE = Architecture(
    name="granitemoehybrid",
    model_types=("granitemoehybrid",),
    blocks="model.layers",
    matrices=_matrices,
    sites=_sites,
    kept=_kept,
    assumes=decoder.WHOLE_ROTARY,
)
