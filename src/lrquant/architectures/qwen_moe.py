"""Qwen2-MoE and Qwen3-MoE: experts in all blocks or every few, and in the first one more for all.

In the second q and k are normalised after projection.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from lrquant.architectures import decoder
from lrquant.architectures.mixture import (
    Mixture,
    attention_sites,
    beside_a_gated_one,
    every_few,
    mixture_family,
    rotary_attention_sites,
)
from lrquant.architectures.sites import Site

_SHARED = "qwen2_moe"


def _mixture(config: PretrainedConfig, block: int) -> Mixture | None:
    if not every_few(config, block):
        return None
    if config.model_type == _SHARED:
        return beside_a_gated_one(config)
    return Mixture(config.num_experts, config.moe_intermediate_size)


def _attention(config: PretrainedConfig, block: int) -> tuple[Site, ...]:
    sites = rotary_attention_sites("half") if config.model_type == _SHARED else attention_sites
    return sites(config, block)


ARCHITECTURE = mixture_family(
    "qwen_moe",
    _mixture,
    _attention,
    model_types=("qwen3_moe", "qwen2_moe"),
    language_types=("qwen3_vl_moe_text",),
    assumes=decoder.WHOLE_ROTARY,
    windows_begin="stream",
)
