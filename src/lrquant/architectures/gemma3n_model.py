"""Gemma 3n as it is published: its language part, and towers that stay in floating point."""

from lrquant.architectures.multimodal import multimodal

ARCHITECTURE = multimodal(
    name="gemma3n_model",
    model_types=("gemma3n",),
    blocks="model.language_model.layers",
    tower="model.vision_tower",
    hands_on="shared_kv_states",
)
