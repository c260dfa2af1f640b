"""Shared shape of the pre-norm, RoPE, gated-MLP decoders (LLaMA and its descendants)."""

from __future__ import annotations

from transformers import PretrainedConfig

from lrquant.architectures.matrix import Matrix, fused_linear, linear, linears
from lrquant.architectures.sites import (
    Site,
    norm_site,
    query_key_site,
    up_down_site,
    value_output_site,
)

ATTENTION_INPUTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MLP_INPUTS = ("mlp.gate_proj", "mlp.up_proj")
GATE_UP = "mlp.gate_up_proj"
LINEARS = (*ATTENTION_INPUTS, "self_attn.o_proj", *MLP_INPUTS, "mlp.down_proj")

WHOLE_ROTARY = {"partial_rotary_factor": (None, 1.0)}  # what pairs of halves and neighbours assume


def matrices(config: PretrainedConfig, block: int) -> tuple[Matrix, ...]:
    """The seven linears of a block."""
    return linears(*LINEARS)


def sites(
    config: PretrainedConfig, block: int, rotary: str | None = "half", norm_offset: float = 0.0
) -> tuple[Site, ...]:
    """All sites; for families without norms on q and k, whose channels turn as `rotary` says."""
    heads, kv_heads, head_dim = head_shape(config)
    query_key = query_key_site(
        "self_attn.q_proj", "self_attn.k_proj", heads, kv_heads, head_dim, rotary
    )
    return (*sites_without_query_key(config, block, norm_offset=norm_offset), query_key)


def sites_without_query_key(
    config: PretrainedConfig,
    block: int,
    mlp_norm: str = "post_attention_layernorm",
    norm_offset: float = 0.0,
) -> tuple[Site, ...]:
    """The sites that remain where q and k are normalised after projection.

    Norms multiply with their stored weight and `norm_offset`.
    """
    return (
        norm_site("input_layernorm", ATTENTION_INPUTS, config.hidden_size, norm_offset),
        norm_site(mlp_norm, MLP_INPUTS, config.hidden_size, norm_offset),
        *sites_without_norms(config, block),
    )


def mlp_sites(config: PretrainedConfig, norm: str, norm_offset: float = 0.0) -> tuple[Site, ...]:
    """The sites of a gated MLP: of the norm that it alone reads, and within it."""
    return (
        norm_site(norm, MLP_INPUTS, config.hidden_size, norm_offset),
        up_down_site("mlp.up_proj", "mlp.down_proj", config.intermediate_size),
    )


def fused_mlp_matrices(config: PretrainedConfig) -> tuple[Matrix, ...]:
    """Gate and up in one linear, and down."""
    width = config.intermediate_size
    return *fused_linear(GATE_UP, gate=width, up=width), linear("mlp.down_proj")


def fused_mlp_sites(config: PretrainedConfig, norm: str) -> tuple[Site, ...]:
    """The sites of such an MLP: of the norm that it alone reads, and within it."""
    readers = f"{GATE_UP}.gate", f"{GATE_UP}.up"
    return (
        norm_site(norm, readers, config.hidden_size, measured=GATE_UP),
        up_down_site(f"{GATE_UP}.up", "mlp.down_proj", config.intermediate_size),
    )


def sites_without_norms(config: PretrainedConfig, block: int) -> tuple[Site, ...]:
    """The sites inside attention and MLP: those that remain where the norms come after them."""
    heads, kv_heads, head_dim = head_shape(config)
    return (
        value_output_site("self_attn.v_proj", "self_attn.o_proj", heads, kv_heads, head_dim),
        up_down_site("mlp.up_proj", "mlp.down_proj", config.intermediate_size),
    )


def head_shape(config: PretrainedConfig) -> tuple[int, int, int]:
    """Query heads, key/value heads and channels per head."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, kv_heads, head_dim


def rotary_dim(config: PretrainedConfig) -> int:
    """Channels of each head that RoPE turns."""
    factor = (config.rope_parameters or {}).get("partial_rotary_factor", 1.0)
    return int(head_shape(config)[2] * factor)
