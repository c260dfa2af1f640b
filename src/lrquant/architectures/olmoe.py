"""OLMoE: experts in every block, q and k normalised over all heads after projection."""

from __future__ import annotations

from lrquant.architectures.mixture import Mixture, mixture_family

ARCHITECTURE = mixture_family(
    "olmoe",
    lambda config, block: Mixture(config.num_experts, config.intermediate_size),
    assumes={"clip_qkv": (None,)},  # values that are cut off do not take a scale
)
