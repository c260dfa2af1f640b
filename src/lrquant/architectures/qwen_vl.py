"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL (with DeepStack features) and Qwen3.5: multimodal RoPE.

The last two with experts too.
"""

from lrquant.architectures.multimodal import multimodal

ARCHITECTURE = multimodal(
    name="qwen_vl",
    model_types=("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
    blocks="model.language_model.layers",
    tower="model.visual",
)
