"""Gemma 4 as it is published: its language part, and towers that stay in floating point."""

from lrquant.architectures.multimodal import multimodal

ARCHITECTURE = multimodal(
    name="gemma4_model",
    model_types=("gemma4",),
    blocks="model.language_model.layers",
    tower="model.vision_tower",
    hands_on="shared_kv_states",
)
