"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: q, k and v in one linear, gate and up in another.

In Phi-4-mini RoPE turns three quarters of each head.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from lrquant.architectures import Architecture, decoder
from lrquant.architectures.matrix import Matrix, fused_linear, linear
from lrquant.architectures.sites import Site, norm_site, query_key_site, value_output_site

_QKV, _OUTPUT = "self_attn.qkv_proj", "self_attn.o_proj"


def _matrices(config: PretrainedConfig, block: int) -> tuple[Matrix, ...]:
    heads, kv_heads, head_dim = decoder.head_shape(config)
    rows = {"q": heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim}
    attention = *fused_linear(_QKV, **rows), linear(_OUTPUT)
    return *attention, *decoder.fused_mlp_matrices(config)


def _sites(config: PretrainedConfig, block: int) -> tuple[Site, ...]:
    query, key, value = (f"{_QKV}.{part}" for part in "qkv")
    shape, turned = decoder.head_shape(config), decoder.rotary_dim(config)
    return (
        norm_site("input_layernorm", (query, key, value), config.hidden_size, measured=_QKV),
        *decoder.fused_mlp_sites(config, "post_attention_layernorm"),
        value_output_site(value, _OUTPUT, *shape),
        query_key_site(query, key, *shape, rotary="half", rotary_dim=turned),
    )


ARCHITECTURE = Architecture(
    name="phi3",
    model_types=("phi3",),
    blocks="model.layers",
    matrices=_matrices,
    sites=_sites,
)
