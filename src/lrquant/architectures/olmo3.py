"""OLMo 3: OLMo 2 with a sliding window in three blocks of four."""

from lrquant.architectures import Architecture, decoder

ARCHITECTURE = Architecture(
    name="olmo3",
    model_types=("olmo3",),
    blocks="model.layers",
    matrices=decoder.matrices,
    sites=decoder.sites_without_norms,
    assumes=decoder.WHOLE_ROTARY,
)
