"""K-EXAONE: experts in blocks that are named so, and one more for all; q and k are normalised."""

from __future__ import annotations

from transformers import PretrainedConfig

from lrquant.architectures.mixture import Mixture, mixture_family


def _mixture(config: PretrainedConfig, block: int) -> Mixture | None:
    if config.mlp_layer_types[block] != "sparse":
        return None
    width = config.moe_intermediate_size
    shared = width * config.num_shared_experts
    return Mixture(config.num_experts, width, shared="shared_experts", shared_width=shared)


ARCHITECTURE = mixture_family("exaone_moe", _mixture)
