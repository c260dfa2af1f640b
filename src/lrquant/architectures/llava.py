"""LLaVA, and the models that have its form: a vision tower, a projector, a language model.

LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision (and VILA as one of them), InternVL, PaliGemma, Gemma 3,
Mistral 3 (Mistral Small 3.1 and Ministral 3).
"""

from lrquant.architectures.multimodal import multimodal

ARCHITECTURE = multimodal(
    name="llava",
    model_types=(
        "llava",
        "llava_next",
        "llava_onevision",
        "internvl",
        "paligemma",
        "gemma3",
        "mistral3",
    ),
    blocks="model.language_model.layers",
    tower="model.vision_tower",
)
