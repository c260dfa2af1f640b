"""Gemma: LLaMA whose norms store their weight less 1."""

from lrquant.architectures import Architecture, decoder

ARCHITECTURE = Architecture(
    name="gemma",
    model_types=("gemma",),
    blocks="model.layers",
    linears=decoder.linears,
    sites=lambda config: decoder.sites(config, norm_offset=1.0),
    windows_begin="bos",
)
