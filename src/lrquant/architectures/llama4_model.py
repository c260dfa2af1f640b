"""Llama 4 as it is published: its language part, and a vision tower in floating point."""

from lrquant.architectures.multimodal import multimodal

ARCHITECTURE = multimodal(
    name="llama4_model",
    model_types=("llama4",),
    blocks="language_model.model.layers",
    tower="vision_model",
)
