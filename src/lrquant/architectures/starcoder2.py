"""StarCoder2: LayerNorms, biases, RoPE, and a GELU without a gate: no site in the MLP."""

from __future__ import annotations

from transformers import PretrainedConfig

from lrquant.architectures import Architecture, decoder
from lrquant.architectures.matrix import Matrix, linears
from lrquant.architectures.sites import Site, norm_site, query_key_site, value_output_site


def _matrices(config: PretrainedConfig, block: int) -> tuple[Matrix, ...]:
    return linears(*decoder.ATTENTION_INPUTS, "self_attn.o_proj", "mlp.c_fc", "mlp.c_proj")


def _sites(config: PretrainedConfig, block: int) -> tuple[Site, ...]:
    query, key, value = decoder.ATTENTION_INPUTS
    shape = decoder.head_shape(config)
    return (
        norm_site("input_layernorm", decoder.ATTENTION_INPUTS, config.hidden_size),
        norm_site("post_attention_layernorm", ("mlp.c_fc",), config.hidden_size),
        value_output_site(value, "self_attn.o_proj", *shape),
        query_key_site(query, key, *shape, rotary="half"),
    )


ARCHITECTURE = Architecture(
    name="starcoder2",
    model_types=("starcoder2",),
    blocks="model.layers",
    matrices=_matrices,
    sites=_sites,
    assumes=decoder.WHOLE_ROTARY,
)
