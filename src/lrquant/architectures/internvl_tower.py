"""The tower of InternVL: layer scales after each sublayer, in some models norms on q and k."""

from __future__ import annotations

from transformers import PretrainedConfig

from lrquant.architectures import Architecture
from lrquant.architectures.encoder import Names
from lrquant.architectures.sites import Site

_NAMES = Names(
    attention_norm="layernorm_before",
    qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    output="attention.projection_layer",
    mlp_norm="layernorm_after",
    mlp_inputs=("mlp.fc1",),
    mlp_output="mlp.fc2",
)


def _sites(config: PretrainedConfig, block: int) -> tuple[Site, ...]:
    sites = _NAMES.sites(config.hidden_size, config.num_attention_heads)
    return tuple(site for site in sites if site.kind != "query_key" or not config.use_qk_norm)


TOWER = Architecture(
    name="internvl_tower",
    model_types=("internvl_vision",),
    blocks="encoder.layer",
    matrices=lambda config, block: _NAMES.matrices,
    sites=_sites,
    reads_pixels=True,
)
