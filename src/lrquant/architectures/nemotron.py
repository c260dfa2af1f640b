"""Nemotron-4 and Minitron: LayerNorms that store their weight less 1, and squared ReLU, no gate.

Down reads the square of what up gives: a scale leaves up once and enters down squared.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from lrquant.architectures import Architecture, decoder
from lrquant.architectures.matrix import Matrix, linears
from lrquant.architectures.sites import (
    Site,
    norm_site,
    query_key_site,
    up_down_site,
    value_output_site,
)

_UP, _DOWN = "mlp.up_proj", "mlp.down_proj"


def _matrices(config: PretrainedConfig, block: int) -> tuple[Matrix, ...]:
    return linears(*decoder.ATTENTION_INPUTS, "self_attn.o_proj", _UP, _DOWN)


def _sites(config: PretrainedConfig, block: int) -> tuple[Site, ...]:
    query, key, value = decoder.ATTENTION_INPUTS
    shape, turned = decoder.head_shape(config), decoder.rotary_dim(config)
    return (
        norm_site("input_layernorm", decoder.ATTENTION_INPUTS, config.hidden_size, 1.0),
        norm_site("post_attention_layernorm", (_UP,), config.hidden_size, 1.0),
        value_output_site(value, "self_attn.o_proj", *shape),
        query_key_site(query, key, *shape, rotary="half", rotary_dim=turned),
        up_down_site(_UP, _DOWN, config.intermediate_size, power=2),
    )


ARCHITECTURE = Architecture(
    name="nemotron",
    model_types=("nemotron",),
    blocks="model.layers",
    matrices=_matrices,
    sites=_sites,
    assumes={"hidden_act": ("relu2",)},
)
