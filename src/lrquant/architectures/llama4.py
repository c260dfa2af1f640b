"""Llama 4, text: experts in all blocks or every other, RoPE in three blocks of four.

A score is multiplied into what an expert reads, not into what it gives, so that a shift of that
would depend on the token.  Blocks with RoPE may normalise q and k after it, by their length alone.
"""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from lrquant.architectures import Architecture, decoder
from lrquant.architectures.matrix import Matrix, linears
from lrquant.architectures.mixture import (
    NAMES,
    Mixture,
    attention_matrices,
    attention_sites,
    rotary_attention_sites,
)
from lrquant.architectures.sites import Site, norm_site, up_down_site

_MLP, _NORM = "feed_forward", "post_attention_layernorm"
_GATE, _UP, _DOWN = (f"{_MLP}.{name}" for name in NAMES)


def _mixture(config: PretrainedConfig, block: int) -> Mixture | None:
    if block not in config.moe_layers:
        return None
    width = config.intermediate_size
    return Mixture(
        config.num_local_experts,
        width,
        _MLP,
        "router",
        shared="shared_expert",
        shared_width=width,
        transposed=True,
    )


def _matrices(config: PretrainedConfig, block: int) -> tuple[Matrix, ...]:
    own = _mixture(config, block)
    mlp = own.matrices(config.hidden_size) if own else linears(_GATE, _UP, _DOWN)
    return *attention_matrices(config, block), *mlp


def _sites(config: PretrainedConfig, block: int) -> tuple[Site, ...]:
    own, size = _mixture(config, block), config.hidden_size
    attention = _attention_sites(config, block)
    if own is not None:
        return *attention, replace(own.norm_site(_NORM, size), shiftable=False), *own.inner_sites
    return (
        *attention,
        norm_site(_NORM, (_GATE, _UP), size),
        up_down_site(_UP, _DOWN, config.intermediate_size_mlp),
    )


def _attention_sites(config: PretrainedConfig, block: int) -> tuple[Site, ...]:
    turned = bool(config.no_rope_layers[block])  # 1 where a block has RoPE
    if turned and config.use_qk_norm:
        return attention_sites(config, block)
    return rotary_attention_sites("interleaved" if turned else None)(config, block)


def _kept(config: PretrainedConfig, block: int) -> tuple[str, ...]:
    own = _mixture(config, block)
    return own.kept_weights if own else ()


ARCHITECTURE = Architecture(
    name="llama4",
    model_types=("llama4_text",),
    blocks="model.layers",
    matrices=_matrices,
    sites=_sites,
    kept=_kept,
    assumes=decoder.WHOLE_ROTARY,
)
