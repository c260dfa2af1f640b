"""GPT-NeoX and Pythia: q, k and v of each head in turn in one linear, RoPE over a part of each.

Attention and MLP have a norm each, in parallel or one after the other, and the MLP no gate.
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

_QKV, _OUTPUT = "attention.query_key_value", "attention.dense"
_UP, _DOWN = "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"


def _matrices(config: PretrainedConfig, block: int) -> tuple[Matrix, ...]:
    return linears(_QKV, _OUTPUT, _UP, _DOWN)


def _sites(config: PretrainedConfig, block: int) -> tuple[Site, ...]:
    shape, turned = decoder.head_shape(config), decoder.rotary_dim(config)
    sites = (
        norm_site("input_layernorm", (_QKV,), config.hidden_size),
        norm_site("post_attention_layernorm", (_UP,), config.hidden_size),
        value_output_site(_QKV, _OUTPUT, *shape, grouped=True),
        query_key_site(_QKV, _QKV, *shape, rotary="half", rotary_dim=turned, grouped=True),
    )
    if config.hidden_act == "relu":
        return *sites, up_down_site(_UP, _DOWN, config.intermediate_size)
    return sites


ARCHITECTURE = Architecture(
    name="gpt_neox",
    model_types=("gpt_neox",),
    blocks="gpt_neox.layers",
    matrices=_matrices,
    sites=_sites,
)
