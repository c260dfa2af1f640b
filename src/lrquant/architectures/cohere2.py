"""Cohere 2 (Command R7B and A): attention and MLP read one norm, a LayerNorm without bias.

RoPE turns neighbouring channels where a block has a sliding window; full attention has none.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from lrquant.architectures import Architecture, decoder
from lrquant.architectures.sites import Site, norm_site, query_key_site


def _sites(config: PretrainedConfig, block: int) -> tuple[Site, ...]:
    sliding = config.layer_types[block] == "sliding_attention" and config.sliding_window is not None
    readers = (*decoder.ATTENTION_INPUTS, *decoder.MLP_INPUTS)
    query, key, _ = decoder.ATTENTION_INPUTS
    return (
        norm_site("input_layernorm", readers, config.hidden_size),
        *decoder.sites_without_norms(config, block),
        query_key_site(
            query, key, *decoder.head_shape(config), rotary="interleaved" if sliding else None
        ),
    )


ARCHITECTURE = Architecture(
    name="cohere2",
    model_types=("cohere2",),
    blocks="model.layers",
    matrices=decoder.matrices,
    sites=_sites,
    assumes=decoder.WHOLE_ROTARY,
)
