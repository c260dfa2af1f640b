"""FlexOlmo: OLMo 2 with experts in every block, whose norms come after the sublayers."""

from __future__ import annotations

from transformers import PretrainedConfig

from lrquant.architectures import decoder
from lrquant.architectures.mixture import Mixture, mixture_family
from lrquant.architectures.sites import Site, value_output_site


def _sites(config: PretrainedConfig, block: int) -> tuple[Site, ...]:
    shape = decoder.head_shape(config)
    return (value_output_site("self_attn.v_proj", "self_attn.o_proj", *shape),)


ARCHITECTURE = mixture_family(
    "flex_olmo",
    lambda config, block: Mixture(config.num_experts, config.intermediate_size),
    _sites,
    norm=None,
)
