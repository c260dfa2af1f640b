"""Granite 4: Mamba 2 mixers with attention in some blocks, and experts beside the MLP or none."""

from __future__ import annotations

from transformers import PretrainedConfig

from lrquant.architectures import Architecture, decoder, mamba, shared_mlp
from lrquant.architectures.matrix import Matrix, linears
from lrquant.architectures.sites import (
    Site,
    norm_site,
    query_key_site,
    value_output_site,
)

_MIXER, _OUTPUT = "mamba", "self_attn.o_proj"


def _is_mamba(config: PretrainedConfig, block: int) -> bool:
    return bool(config.layers_block_type[block] == "linear_attention")


def _matrices(config: PretrainedConfig, block: int) -> tuple[Matrix, ...]:
    attention = *decoder.ATTENTION_INPUTS, _OUTPUT
    mixer = mamba.names(_MIXER) if _is_mamba(config, block) else attention
    return *linears(*mixer), *shared_mlp.matrices(config)


def _kept(config: PretrainedConfig, block: int) -> tuple[str, ...]:
    mixer = mamba.kept(_MIXER) if _is_mamba(config, block) else ()
    return *mixer, *shared_mlp.kept(config)


def _sites(config: PretrainedConfig, block: int) -> tuple[Site, ...]:
    return *_mixer_sites(config, block), *shared_mlp.sites(config)


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
    cumulative=True,
)
