"""ERNIE 4.5 with experts in some blocks: RoPE turns neighbours, a bias corrects the router."""

from __future__ import annotations

from transformers import PretrainedConfig

from lrquant.architectures import decoder
from lrquant.architectures.mixture import Mixture, mixture_family, rotary_attention_sites


def _mixture(config: PretrainedConfig, block: int) -> Mixture | None:
    first, last = config.moe_layer_start_index, config.moe_layer_end_index
    if (block + 1) % config.moe_layer_interval or not first <= block <= last:
        return None
    width, shared = config.moe_intermediate_size, config.moe_num_shared_experts
    return Mixture(
        config.moe_num_experts,
        width,
        shared="shared_experts" if shared else None,
        shared_width=width * shared,
        kept=("gate.moe_statics.e_score_correction_bias",),
    )


ARCHITECTURE = mixture_family(
    "ernie4_5_moe",
    _mixture,
    rotary_attention_sites("interleaved"),
    assumes=decoder.WHOLE_ROTARY,
)
