"""Apertus: norms on q and k, and xIELU without a gate: neither a q-k nor an up-down site."""

from __future__ import annotations

from transformers import PretrainedConfig

from lrquant.architectures import Architecture, decoder
from lrquant.architectures.matrix import Matrix, linears
from lrquant.architectures.sites import Site, norm_site, value_output_site


def _matrices(config: PretrainedConfig, block: int) -> tuple[Matrix, ...]:
    return linears(*decoder.ATTENTION_INPUTS, "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def _sites(config: PretrainedConfig, block: int) -> tuple[Site, ...]:
    _, _, value = decoder.ATTENTION_INPUTS
    return (
        norm_site("attention_layernorm", decoder.ATTENTION_INPUTS, config.hidden_size),
        norm_site("feedforward_layernorm", ("mlp.up_proj",), config.hidden_size),
        value_output_site(value, "self_attn.o_proj", *decoder.head_shape(config)),
    )


ARCHITECTURE = Architecture(
    name="apertus",
    model_types=("apertus",),
    blocks="model.layers",
    matrices=_matrices,
    sites=_sites,
    assumes=decoder.WHOLE_ROTARY,
)
