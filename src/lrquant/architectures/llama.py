"""LLaMA 1, 2 and 3: grouped-query attention, scaled RoPE, optional biases, tied heads."""

from lrquant.architectures import Architecture, decoder

ARCHITECTURE = Architecture(
    name="llama",
    model_types=("llama",),
    blocks="model.layers",
    matrices=decoder.matrices,
    sites=decoder.sites,
    assumes=decoder.WHOLE_ROTARY,
    windows_begin="stream",
)
