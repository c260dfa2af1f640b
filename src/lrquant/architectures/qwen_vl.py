"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: multimodal RoPE, and in the last DeepStack features."""

from lrquant.architectures.multimodal import multimodal

ARCHITECTURE = multimodal(
    name="qwen_vl",
    model_types=("qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
    blocks="model.language_model.layers",
    tower="model.visual",
)
