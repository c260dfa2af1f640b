"""OLMo 2: norms after the sublayers and on q and k, so that none feeds linears alone."""

from lrquant.architectures import Architecture, decoder

ARCHITECTURE = Architecture(
    name="olmo2",
    model_types=("olmo2",),
    blocks="model.layers",
    matrices=decoder.matrices,
    sites=decoder.sites_without_norms,
    assumes=decoder.WHOLE_ROTARY,
)
