"""Qwen2-MoE and Qwen3-MoE: experts in all blocks or every few, and in the first one more for all.

In the second q and k are normalised after projection.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from lrquant.architectures import decoder
from lrquant.architectures.mixture import (
    Mixture,
    attention_sites,
    mixture_family,
    rotary_attention_sites,
)
from lrquant.architectures.sites import Site

_SHARED = "qwen2_moe"


def _mixture(config: PretrainedConfig, block: int) -> Mixture | None:
    sparse = config.num_experts > 0 and (block + 1) % config.decoder_sparse_step == 0
    if block in config.mlp_only_layers or not sparse:
        return None
    count, width = config.num_experts, config.moe_intermediate_size
    if config.model_type != _SHARED:
        return Mixture(count, width)
    return Mixture(
        count,
        width,
        shared="shared_expert",
        shared_width=config.shared_expert_intermediate_size,
        shared_gate="shared_expert_gate",
    )


def _attention(config: PretrainedConfig, block: int) -> tuple[Site, ...]:
    sites = rotary_attention_sites("half") if config.model_type == _SHARED else attention_sites
    return sites(config, block)


ARCHITECTURE = mixture_family(
    "qwen_moe",
    _mixture,
    _attention,
    model_types=("qwen3_moe", "qwen2_moe"),
    assumes=decoder.WHOLE_ROTARY,
    windows_begin="stream",
)
