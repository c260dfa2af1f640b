"""Gemma 3, text: norms before and after each sublayer, weights less 1, q and k normalised.

The norm before the MLP has a name of its own; those after the sublayers feed the residual, so that
no scale can leave them.  Blocks with a sliding window alternate with full ones.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from lrquant.architectures import Architecture, decoder
from lrquant.architectures.sites import Site


def _sites(config: PretrainedConfig, block: int) -> tuple[Site, ...]:
    return decoder.sites_without_query_key(
        config, block, mlp_norm="pre_feedforward_layernorm", norm_offset=1.0
    )


ARCHITECTURE = Architecture(
    name="gemma3",
    model_types=("gemma3_text",),
    blocks="model.layers",
    matrices=decoder.matrices,
    sites=_sites,
    assumes=decoder.WHOLE_ROTARY,
    windows_begin="bos",
)
