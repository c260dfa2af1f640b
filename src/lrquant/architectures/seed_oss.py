"""Seed-OSS: LLaMA with biases on q, k and v and a head size of its own."""

from lrquant.architectures import Architecture, decoder

ARCHITECTURE = Architecture(
    name="seed_oss",
    model_types=("seed_oss",),
    blocks="model.layers",
    matrices=decoder.matrices,
    sites=decoder.sites,
    assumes=decoder.WHOLE_ROTARY,
)
