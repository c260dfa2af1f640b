"""Falcon-H1: a Mamba 2 mixer and attention side by side in every block, read from one norm.

Each reads what the norm gives times a factor of its own, so that no shift passes.
"""

from __future__ import annotations

from dataclasses import replace

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

_MIXER, _OUTPUT = "mamba", "self_attn.o_proj"
_GATE, _UP, _DOWN = (f"feed_forward.{name}_proj" for name in ("gate", "up", "down"))


def _matrices(config: PretrainedConfig, block: int) -> tuple[Matrix, ...]:
    mixers = *decoder.ATTENTION_INPUTS, _OUTPUT, *mamba.names(_MIXER)
    return linears(*mixers, _GATE, _UP, _DOWN)


def _sites(config: PretrainedConfig, block: int) -> tuple[Site, ...]:
    query, key, value = decoder.ATTENTION_INPUTS
    readers, shape = (query, key, value, f"{_MIXER}.in_proj"), decoder.head_shape(config)
    width = config.mamba_d_ssm or int(config.mamba_expand * config.hidden_size)
    return (
        replace(norm_site("input_layernorm", readers, config.hidden_size), shiftable=False),
        norm_site("pre_ff_layernorm", (_GATE, _UP), config.hidden_size),
        *((mamba.norm_site(_MIXER, width),) if config.mamba_rms_norm else ()),
        value_output_site(value, _OUTPUT, *shape),
        query_key_site(query, key, *shape, rotary="half"),
        up_down_site(_UP, _DOWN, config.intermediate_size),
    )


ARCHITECTURE = Architecture(
    name="falcon_h1",
    model_types=("falcon_h1",),
    blocks="model.layers",
    matrices=_matrices,
    sites=_sites,
    kept=lambda config, block: mamba.kept(_MIXER),
    assumes=decoder.WHOLE_ROTARY,
    in_tuples=True,
    cumulative=True,
)
