"""Mixtral and Phi-3.5-MoE: experts in every block, published as w1, w3 and w2.

The second has LayerNorms, and another name for its router.
"""

from __future__ import annotations

from lrquant.architectures import decoder
from lrquant.architectures.mixture import Mixture, mixture_family, rotary_attention_sites

_PHI = "phimoe"

ARCHITECTURE = mixture_family(
    "mixtral",
    lambda config, block: Mixture(
        config.num_local_experts,
        config.intermediate_size,
        router="router" if config.model_type == _PHI else "gate",
        names=("w1", "w3", "w2"),
    ),
    rotary_attention_sites("half"),
    model_types=("mixtral", "phimoe"),
    assumes=decoder.WHOLE_ROTARY,
)
