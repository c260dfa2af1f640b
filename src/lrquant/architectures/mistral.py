"""Mistral: LLaMA with an optional sliding window."""

from lrquant.architectures import Architecture, decoder

ARCHITECTURE = Architecture(
    name="mistral",
    model_types=("mistral",),
    blocks="model.layers",
    matrices=decoder.matrices,
    sites=decoder.sites,
    assumes=decoder.WHOLE_ROTARY,
    windows_begin="stream",
)
