"""MiniMax M2: experts in every block, published as w1, w3 and w2; q and k normalised over heads."""

from __future__ import annotations

from lrquant.architectures.mixture import Mixture, mixture_family

ARCHITECTURE = mixture_family(
    "minimax_m2",
    lambda config, block: Mixture(
        config.num_local_experts, config.intermediate_size, names=("w1", "w3", "w2")
    ),
)
