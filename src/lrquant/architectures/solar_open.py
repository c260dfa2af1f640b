"""Solar Open: experts in every block, and one more for all."""

from __future__ import annotations

from transformers import PretrainedConfig

from lrquant.architectures import decoder
from lrquant.architectures.mixture import Mixture, mixture_family, rotary_attention_sites


def _mixture(config: PretrainedConfig, block: int) -> Mixture:
    width = config.moe_intermediate_size
    shared = width * config.n_shared_experts
    return Mixture(config.n_routed_experts, width, shared="shared_experts", shared_width=shared)


ARCHITECTURE = mixture_family(
    "solar_open", _mixture, rotary_attention_sites("half"), assumes=decoder.WHOLE_ROTARY
)
