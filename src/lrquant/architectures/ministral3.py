"""Ministral 3 and Devstral 2: Mistral whose queries grow with their position."""

from lrquant.architectures import Architecture, decoder

ARCHITECTURE = Architecture(
    name="ministral3",
    model_types=("ministral3",),
    blocks="model.layers",
    matrices=decoder.matrices,
    sites=decoder.sites,
    assumes=decoder.WHOLE_ROTARY,
)
