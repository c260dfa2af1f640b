"""Falcon 1 and 2: q, k and v in one linear, the queries, key and value of each group in turn.

Attention and MLP stand in parallel after one norm or two, or one after the other.
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

_QKV, _OUTPUT = "self_attention.query_key_value", "self_attention.dense"
_UP, _DOWN = "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"


def _matrices(config: PretrainedConfig, block: int) -> tuple[Matrix, ...]:
    return linears(_QKV, _OUTPUT, _UP, _DOWN)


def _head_shape(config: PretrainedConfig) -> tuple[int, int, int]:
    """Query heads, key/value heads and channels per head."""
    heads = config.num_attention_heads
    kv_heads = 1 if config.multi_query else heads
    if config.new_decoder_architecture:
        kv_heads = config.num_kv_heads
    return heads, kv_heads, config.head_dim


def _norms(config: PretrainedConfig) -> dict[str, tuple[str, ...]]:
    """Which linears read each norm."""
    if config.parallel_attn and not _has_two_norms(config):
        return {"input_layernorm": (_QKV, _UP)}
    if config.parallel_attn:
        return {"ln_attn": (_QKV,), "ln_mlp": (_UP,)}
    return {"input_layernorm": (_QKV,), "post_attention_layernorm": (_UP,)}


def _has_two_norms(config: PretrainedConfig) -> bool:
    return bool(config.new_decoder_architecture and config.num_ln_in_parallel_attn in (None, 2))


def _sites(config: PretrainedConfig, block: int) -> tuple[Site, ...]:
    shape, rotary = _head_shape(config), "half" if config.rotary else None
    sites = (
        *(norm_site(norm, read, config.hidden_size) for norm, read in _norms(config).items()),
        value_output_site(_QKV, _OUTPUT, *shape, grouped=True),
        query_key_site(_QKV, _QKV, *shape, rotary=rotary, grouped=True),
    )
    if config.activation == "relu":
        return *sites, up_down_site(_UP, _DOWN, config.ffn_hidden_size)
    return sites


def _refusal(config: PretrainedConfig) -> str | None:
    if config.new_decoder_architecture and not config.parallel_attn:
        return "new_decoder_architecture without parallel_attn is a form that no model has"
    if config.num_ln_in_parallel_attn == 2 and not config.new_decoder_architecture:
        return "num_ln_in_parallel_attn 2 without new_decoder_architecture is a form of no model"
    return None


ARCHITECTURE = Architecture(
    name="falcon",
    model_types=("falcon",),
    blocks="transformer.h",
    matrices=_matrices,
    sites=_sites,
    assumes=decoder.WHOLE_ROTARY,
    refusal=_refusal,
    own_attention=True,
    in_tuples=True,
)
