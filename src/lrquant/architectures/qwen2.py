"""Qwen2 and Qwen2.5: LLaMA with biases on q, k and v."""

from lrquant.architectures import Architecture, decoder

ARCHITECTURE = Architecture(
    name="qwen2",
    model_types=("qwen2",),
    blocks="model.layers",
    matrices=decoder.matrices,
    sites=decoder.sites,
    assumes=decoder.WHOLE_ROTARY,
    language_types=("qwen2_vl_text", "qwen2_5_vl_text"),
    windows_begin="stream",
)
