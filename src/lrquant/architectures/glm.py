"""GLM-4 of 2024: gate and up in one linear, RoPE that turns neighbours in a part of each head."""

from __future__ import annotations

from transformers import PretrainedConfig

from lrquant.architectures import Architecture, decoder
from lrquant.architectures.matrix import Matrix, linears
from lrquant.architectures.sites import Site, norm_site, query_key_site, value_output_site


def matrices(config: PretrainedConfig, block: int) -> tuple[Matrix, ...]:
    """Attention of four linears, and an MLP of two."""
    attention = linears(*decoder.ATTENTION_INPUTS, "self_attn.o_proj")
    return *attention, *decoder.fused_mlp_matrices(config)


def sites(config: PretrainedConfig, block: int) -> tuple[Site, ...]:
    """All sites."""
    query, key, value = decoder.ATTENTION_INPUTS
    shape, turned = decoder.head_shape(config), decoder.rotary_dim(config)
    return (
        norm_site("input_layernorm", decoder.ATTENTION_INPUTS, config.hidden_size),
        *decoder.fused_mlp_sites(config, "post_attention_layernorm"),
        value_output_site(value, "self_attn.o_proj", *shape),
        query_key_site(query, key, *shape, rotary="interleaved", rotary_dim=turned),
    )


ARCHITECTURE = Architecture(
    name="glm",
    model_types=("glm",),
    blocks="model.layers",
    matrices=matrices,
    sites=sites,
)
