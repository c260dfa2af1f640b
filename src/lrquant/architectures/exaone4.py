"""EXAONE 4: norms after the sublayers and on q and k; full attention without RoPE."""

from lrquant.architectures import Architecture, decoder

ARCHITECTURE = Architecture(
    name="exaone4",
    model_types=("exaone4",),
    blocks="model.layers",
    matrices=decoder.matrices,
    sites=decoder.sites_without_norms,
    assumes=decoder.WHOLE_ROTARY,
)
