"""Gemma: LLaMA whose norms store their weight less 1."""

from lrquant.architectures import Architecture, decoder

ARCHITECTURE = Architecture(
    name="gemma",
    model_types=("gemma",),
    blocks="model.layers",
    matrices=decoder.matrices,
    sites=lambda config, block: decoder.sites(config, block, norm_offset=1.0),
    assumes=decoder.WHOLE_ROTARY,
    windows_begin="bos",
)
