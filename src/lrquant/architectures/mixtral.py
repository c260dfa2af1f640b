"""Mixtral: Mistral with experts in every block, published as w1, w3 and w2."""

from __future__ import annotations

from lrquant.architectures import decoder
from lrquant.architectures.mixture import Mixture, mixture_family, rotary_attention_sites

ARCHITECTURE = mixture_family(
    "mixtral",
    lambda config, block: Mixture(
        config.num_local_experts, config.intermediate_size, names=("w1", "w3", "w2")
    ),
    rotary_attention_sites("half"),
    assumes=decoder.WHOLE_ROTARY,
)
