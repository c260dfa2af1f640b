"""Kimi K2.5 and K2.6: DeepSeek-V3's language part, with a vision tower."""

from lrquant.architectures.multimodal import multimodal

ARCHITECTURE = multimodal(
    name="kimi_k25",
    model_types=("kimi_k25",),
    blocks="model.language_model.layers",
    tower="model.vision_tower",
)
