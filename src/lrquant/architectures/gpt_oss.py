"""gpt-oss: experts in every block, with biases; attention with sinks; a window in every other.

An expert's gate and up are rows of one matrix in turn, and cut off before they are multiplied, so
that no scale passes from up to down.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from lrquant.architectures import Architecture, decoder
from lrquant.architectures.matrix import Matrix, parts_of_experts
from lrquant.architectures.mixture import attention_matrices
from lrquant.architectures.sites import Site, norm_site, query_key_site, value_output_site

_EXPERTS, _ROUTER = "mlp.experts", "mlp.router"
_FIRST, _SECOND = "gate_up_proj", "down_proj"


def _matrices(config: PretrainedConfig, block: int) -> tuple[Matrix, ...]:
    rows = {_FIRST: 2 * config.intermediate_size, _SECOND: config.hidden_size}
    return (
        *attention_matrices(config, block),
        *(
            matrix
            for name, count in rows.items()
            for matrix in parts_of_experts(
                _EXPERTS,
                name,
                config.num_local_experts,
                {name: count},
                reads_input=name == _FIRST,
                transposed=True,
                bias=f"{name}_bias",
            )
        ),
    )


def _sites(config: PretrainedConfig, block: int) -> tuple[Site, ...]:
    query, key, value = decoder.ATTENTION_INPUTS
    shape, hidden_size = decoder.head_shape(config), config.hidden_size
    readers = [f"{_EXPERTS}.{index}.{_FIRST}" for index in range(config.num_local_experts)]
    return (
        norm_site("input_layernorm", (query, key, value), hidden_size),
        # sinks take from the sum of attention's weights
        value_output_site(value, "self_attn.o_proj", *shape, shiftable=False),
        query_key_site(query, key, *shape, rotary="half"),
        norm_site("post_attention_layernorm", (*readers, _ROUTER), hidden_size, measured=_EXPERTS),
    )


ARCHITECTURE = Architecture(
    name="gpt_oss",
    model_types=("gpt_oss",),
    blocks="model.layers",
    matrices=_matrices,
    sites=_sites,
    kept=lambda config, block: (f"{_ROUTER}.weight",),
    assumes=decoder.WHOLE_ROTARY,
)
