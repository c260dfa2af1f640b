"""Granite 4 without experts: Mamba 2 mixers with attention in some blocks, gate and up fused."""

from __future__ import annotations

from transformers import PretrainedConfig

from lrquant.architectures import Architecture, decoder, mamba
from lrquant.architectures.matrix import Matrix, fused_linear, linear, linears
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
    return *linears(*mixer), *fused_linear(_GATE_UP, gate=width, up=width), linear(_DOWN)


def _kept(config: PretrainedConfig, block: int) -> tuple[str, ...]:
    return mamba.kept(_MIXER) if _is_mamba(config, block) else ()


def _sites(config: PretrainedConfig, block: int) -> tuple[Site, ...]:
    gate, up = f"{_GATE_UP}.gate", f"{_GATE_UP}.up"
    return (
        *_mixer_sites(config, block),
        norm_site("post_attention_layernorm", (gate, up), config.hidden_size, measured=_GATE_UP),
        up_down_site(up, _DOWN, config.shared_intermediate_size),
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


def _refusal(config: PretrainedConfig) -> str | None:
    if config.num_local_experts:
        return "its blocks have experts, which this family's declaration does not cover yet"
    return None


ARCHITECTURE = Architecture(
    name="granitemoehybrid",
    model_types=("granitemoehybrid",),
    blocks="model.layers",
    matrices=_matrices,
    sites=_sites,
    kept=_kept,
    assumes=decoder.WHOLE_ROTARY,
    refusal=_refusal,
)
