"""The towers of CLIP, SigLIP, Idefics3 and SmolVLM: one layout of modules."""

from __future__ import annotations

from transformers import PretrainedConfig

from lrquant.architectures import Architecture
from lrquant.architectures.encoder import Names
from lrquant.architectures.sites import Site

_NAMES = Names(
    attention_norm="layer_norm1",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    output="self_attn.out_proj",
    mlp_norm="layer_norm2",
    mlp_inputs=("mlp.fc1",),
    mlp_output="mlp.fc2",
)


def _sites(config: PretrainedConfig, block: int) -> tuple[Site, ...]:
    return _NAMES.sites(config.hidden_size, config.num_attention_heads)


TOWER = Architecture(
    name="clip_tower",
    model_types=("clip_vision_model", "siglip_vision_model", "idefics3_vision", "smolvlm_vision"),
    blocks="encoder.layers",
    matrices=lambda config, block: _NAMES.matrices,
    sites=_sites,
    reads_pixels=True,
)
