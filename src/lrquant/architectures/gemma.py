"""Gemma: LLaMA whose norms store their weight less 1."""

from __future__ import annotations

from transformers import PretrainedConfig

from lrquant.architectures import Architecture, decoder
from lrquant.sites import Site, query_key_site


def _sites(config: PretrainedConfig) -> tuple[Site, ...]:
    heads, kv_heads, head_dim = decoder.head_shape(config)
    query_key = query_key_site(
        "self_attn.q_proj", "self_attn.k_proj", heads, kv_heads, head_dim, rotary="half"
    )
    return (*decoder.sites_without_query_key(config, norm_offset=1.0), query_key)


ARCHITECTURE = Architecture(
    name="gemma",
    model_types=("gemma",),
    blocks="model.layers",
    linears=decoder.linears,
    sites=_sites,
)
