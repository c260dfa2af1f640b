"""Gemma 2: norms before and after each sublayer, weights less 1, soft caps on scores and logits.

Those after the sublayers feed the residual.  Blocks with a sliding window alternate with full ones.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from lrquant.architectures import Architecture, decoder
from lrquant.architectures.sites import Site, query_key_site


def _sites(config: PretrainedConfig, block: int) -> tuple[Site, ...]:
    query, key, _ = decoder.ATTENTION_INPUTS
    return (
        *decoder.sites_without_query_key(
            config, block, mlp_norm="pre_feedforward_layernorm", norm_offset=1.0
        ),
        query_key_site(query, key, *decoder.head_shape(config), rotary="half"),
    )


ARCHITECTURE = Architecture(
    name="gemma2",
    model_types=("gemma2",),
    blocks="model.layers",
    matrices=decoder.matrices,
    sites=_sites,
    assumes=decoder.WHOLE_ROTARY,
    windows_begin="bos",
)
