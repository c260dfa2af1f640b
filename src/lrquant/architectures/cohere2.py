"""Cohere 2 (Command R7B and A), and with experts: attention and MLP read one norm.

RoPE turns neighbouring channels where a block has a sliding window; full attention has none, but in
first, dense blocks of a model of experts that are said to have it.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from lrquant.architectures import Architecture, decoder
from lrquant.architectures.matrix import Matrix
from lrquant.architectures.mixture import Mixture, attention_matrices, mlp_matrices
from lrquant.architectures.sites import (
    Site,
    norm_site,
    query_key_site,
    up_down_site,
    value_output_site,
)

_SPARSE, _OUTPUT = "cohere2_moe", "self_attn.o_proj"


def _mixture(config: PretrainedConfig, block: int) -> Mixture | None:
    if config.model_type != _SPARSE or config.mlp_layer_types[block] == "dense":
        return None
    width, count = config.intermediate_size, config.num_shared_experts
    shared = "shared_experts" if count else None
    return Mixture(config.num_experts, width, shared=shared, shared_width=width * count)


def _turns(config: PretrainedConfig, block: int) -> bool:
    if config.layer_types[block] == "sliding_attention" and config.sliding_window is not None:
        return True
    dense = config.model_type == _SPARSE and config.mlp_layer_types[block] == "dense"
    return bool(dense and config.prefix_dense_sliding_window_pattern == 1)


def _matrices(config: PretrainedConfig, block: int) -> tuple[Matrix, ...]:
    mlp = mlp_matrices(config, _mixture(config, block))
    return *attention_matrices(config, block), *mlp


def _kept(config: PretrainedConfig, block: int) -> tuple[str, ...]:
    own = _mixture(config, block)
    return own.kept_weights if own else ()


def _sites(config: PretrainedConfig, block: int) -> tuple[Site, ...]:
    own, shape = _mixture(config, block), decoder.head_shape(config)
    query, key, value = decoder.ATTENTION_INPUTS
    mlp = own.readers if own else decoder.MLP_INPUTS
    rotary = "interleaved" if _turns(config, block) else None
    return (
        norm_site("input_layernorm", (query, key, value, *mlp), config.hidden_size),
        value_output_site(value, _OUTPUT, *shape),
        query_key_site(query, key, *shape, rotary=rotary),
        *(own.inner_sites if own else _dense_sites(config)),
    )


def _dense_sites(config: PretrainedConfig) -> tuple[Site, ...]:
    width = getattr(config, "prefix_dense_intermediate_size", None) or config.intermediate_size
    return (up_down_site("mlp.up_proj", "mlp.down_proj", width),)


ARCHITECTURE = Architecture(
    name="cohere2",
    model_types=("cohere2", "cohere2_moe"),
    blocks="model.layers",
    matrices=_matrices,
    sites=_sites,
    kept=_kept,
    assumes=decoder.WHOLE_ROTARY,
)
