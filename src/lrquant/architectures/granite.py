"""Granite 3: LLaMA with factors on embeddings, attention, residuals and logits."""

from lrquant.architectures import Architecture, decoder

ARCHITECTURE = Architecture(
    name="granite",
    model_types=("granite",),
    blocks="model.layers",
    matrices=decoder.matrices,
    sites=decoder.sites,
    assumes=decoder.WHOLE_ROTARY,
)
