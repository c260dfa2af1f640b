"""Hunyuan with experts: in every block and one more for all, or (Hy3) in blocks that are named so.

In both q and k are normalised per head.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from lrquant.architectures.mixture import Mixture, mixture_family

_FIRST = "hunyuan_v1_moe"


def _mixture(config: PretrainedConfig, block: int) -> Mixture | None:
    if config.model_type == _FIRST:
        width = config.intermediate_size
        shared = {"shared": "shared_mlp", "shared_width": width}
        return Mixture(config.num_experts, width, router="gate.wg", **shared)
    if config.mlp_layer_types[block] != "sparse":
        return None
    width = config.moe_intermediate_size
    wide = width * config.num_shared_experts
    return Mixture(config.num_experts, width, shared="shared_experts", shared_width=wide)


ARCHITECTURE = mixture_family("hunyuan_moe", _mixture, model_types=("hunyuan_v1_moe", "hy_v3"))
