"""BLOOM: ALiBi, q, k and v of each head in turn in one linear, a GELU without a gate."""

from __future__ import annotations

from transformers import PretrainedConfig

from lrquant.architectures import Architecture, decoder
from lrquant.architectures.matrix import Matrix, linears
from lrquant.architectures.sites import Site, norm_site, query_key_site, value_output_site

_QKV, _OUTPUT = "self_attention.query_key_value", "self_attention.dense"
_UP, _DOWN = "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"


def _matrices(config: PretrainedConfig, block: int) -> tuple[Matrix, ...]:
    return linears(_QKV, _OUTPUT, _UP, _DOWN)


def _sites(config: PretrainedConfig, block: int) -> tuple[Site, ...]:
    shape = decoder.head_shape(config)
    return (
        norm_site("input_layernorm", (_QKV,), config.hidden_size),
        norm_site("post_attention_layernorm", (_UP,), config.hidden_size),
        value_output_site(_QKV, _OUTPUT, *shape, grouped=True),
        query_key_site(_QKV, _QKV, *shape, rotary=None, grouped=True),
    )


ARCHITECTURE = Architecture(
    name="bloom",
    model_types=("bloom",),
    blocks="transformer.h",
    matrices=_matrices,
    sites=_sites,
    assumes={
        "apply_residual_connection_post_layernorm": (False,),  # else norms feed the residual
        "slow_but_exact": (False,),  # else parts of weights are multiplied without their linears
    },
    own_attention=True,
    in_tuples=True,
)
