"""Granite 3 with experts: published, as they are computed, in one tensor a block."""

from __future__ import annotations

from lrquant.architectures import decoder
from lrquant.architectures.mixture import Mixture, mixture_family, rotary_attention_sites

ARCHITECTURE = mixture_family(
    "granitemoe",
    lambda config, block: Mixture(
        config.num_local_experts,
        config.intermediate_size,
        path="block_sparse_moe",
        router="router",
    ),
    rotary_attention_sites("half"),
    assumes=decoder.WHOLE_ROTARY,
)
