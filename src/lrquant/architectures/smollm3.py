"""SmolLM3: LLaMA without RoPE in every fourth block, where each channel of q and k is free."""

from __future__ import annotations

from transformers import PretrainedConfig

from lrquant.architectures import Architecture, decoder
from lrquant.architectures.sites import Site


def _sites(config: PretrainedConfig, block: int) -> tuple[Site, ...]:
    return decoder.sites(config, block, "half" if config.no_rope_layers[block] else None)


ARCHITECTURE = Architecture(
    name="smollm3",
    model_types=("smollm3",),
    blocks="model.layers",
    matrices=decoder.matrices,
    sites=_sites,
    assumes=decoder.WHOLE_ROTARY,
)
