"""GLM-4.5 to 4.7 and dots.llm1: the first blocks dense, an expert more for all, partial RoPE.

Where q and k are normalised there is no site of theirs; dots.llm1 turns whole heads.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from lrquant.architectures.mixture import (
    Mixture,
    attention_sites,
    mixture_family,
    rotary_attention_sites,
)
from lrquant.architectures.sites import Site

_NORMALISED = "dots1"


def _mixture(config: PretrainedConfig, block: int) -> Mixture | None:
    if block < config.first_k_dense_replace:
        return None
    width = config.moe_intermediate_size
    shared = width * config.n_shared_experts
    return Mixture(config.n_routed_experts, width, shared="shared_experts", shared_width=shared)


def _attention(config: PretrainedConfig, block: int) -> tuple[Site, ...]:
    if config.model_type == _NORMALISED or config.use_qk_norm:
        return attention_sites(config, block)
    return rotary_attention_sites("half", part=True)(config, block)


ARCHITECTURE = mixture_family("glm4_moe", _mixture, _attention, model_types=("glm4_moe", "dots1"))
