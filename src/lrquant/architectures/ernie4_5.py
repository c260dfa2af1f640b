"""ERNIE 4.5, dense: LLaMA whose RoPE turns neighbouring channels."""

from lrquant.architectures import Architecture, decoder

ARCHITECTURE = Architecture(
    name="ernie4_5",
    model_types=("ernie4_5",),
    blocks="model.layers",
    matrices=decoder.matrices,
    sites=lambda config, block: decoder.sites(config, block, "interleaved"),
    assumes=decoder.WHOLE_ROTARY,
)
