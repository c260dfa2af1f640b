"""Pixtral, the tower of Mistral 3: RMSNorms, RoPE over rows and columns, a gated MLP."""

from __future__ import annotations

from transformers import PretrainedConfig

from lrquant.architectures import Architecture
from lrquant.architectures.encoder import Names
from lrquant.architectures.sites import Site, up_down_site

_NAMES = Names(
    attention_norm="attention_norm",
    qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    output="attention.o_proj",
    mlp_norm="ffn_norm",
    mlp_inputs=("feed_forward.gate_proj", "feed_forward.up_proj"),
    mlp_output="feed_forward.down_proj",
)


def _sites(config: PretrainedConfig, block: int) -> tuple[Site, ...]:
    return (
        *_NAMES.sites(config.hidden_size, config.num_attention_heads, rotary="half"),
        up_down_site("feed_forward.up_proj", "feed_forward.down_proj", config.intermediate_size),
    )


TOWER = Architecture(
    name="pixtral_tower",
    model_types=("pixtral",),
    blocks="transformer.layers",
    matrices=lambda config, block: _NAMES.matrices,
    sites=_sites,
    reads_pixels=True,
)
