"""Mllama (Llama 3.2 Vision), refused: its blocks are of two kinds."""

import dataclasses

from lrquant.architectures.multimodal import multimodal

ARCHITECTURE = dataclasses.replace(
    multimodal(
        name="mllama",
        model_types=("mllama",),
        blocks="model.language_model.layers",
        tower="model.vision_model",
    ),
    refusal=lambda config: (
        "every fifth block is a cross-attention block that reads the picture's states and not its "
        "tokens, which is not supported yet; use a model whose pictures become tokens, such as "
        "Qwen2.5-VL, LLaVA or SmolVLM"
    ),
)
