"""DeepSeek-V2, V3, GLM-4.7-Flash and Mistral 4: latent attention, first blocks dense or none."""

from __future__ import annotations

from transformers import PretrainedConfig

from lrquant.architectures.latent import latent_matrices, latent_sites
from lrquant.architectures.mixture import Mixture, mixture_family


def _mixture(config: PretrainedConfig, block: int) -> Mixture | None:
    kinds = getattr(config, "mlp_layer_types", None)
    dense = block < config.first_k_dense_replace if kinds is None else kinds[block] != "sparse"
    if dense:
        return None
    width = config.moe_intermediate_size
    shared = width * config.n_shared_experts
    return Mixture(config.n_routed_experts, width, shared="shared_experts", shared_width=shared)


ARCHITECTURE = mixture_family(
    "deepseek",
    _mixture,
    latent_sites,
    latent_matrices,
    model_types=("deepseek_v2", "deepseek_v3", "glm4_moe_lite"),
    language_types=("mistral4",),
)
