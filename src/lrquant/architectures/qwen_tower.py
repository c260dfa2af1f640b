"""Towers of Qwen2-VL to Qwen3.5: q, k and v in one linear, RoPE, packed patches.

That of Qwen2.5-VL has RMSNorms and a gated MLP.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from lrquant.architectures import Architecture
from lrquant.architectures.encoder import Names
from lrquant.architectures.sites import Site, up_down_site

_GATED = "qwen2_5_vl_vision"
_PLAIN = ("mlp.linear_fc1",), "mlp.linear_fc2"
_MLP = {
    "qwen2_vl_vision": (("mlp.fc1",), "mlp.fc2"),
    _GATED: (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
    **dict.fromkeys(("qwen3_vl_vision", "qwen3_vl_moe_vision"), _PLAIN),
    **dict.fromkeys(("qwen3_5_vision", "qwen3_5_moe_vision"), _PLAIN),
}


def _names(config: PretrainedConfig) -> Names:
    mlp_inputs, mlp_output = _MLP[config.model_type]
    return Names("norm1", ("attn.qkv",), "attn.proj", "norm2", mlp_inputs, mlp_output)


def _sites(config: PretrainedConfig, block: int) -> tuple[Site, ...]:
    hidden_size = getattr(config, "embed_dim", None) or config.hidden_size
    sites = _names(config).sites(hidden_size, config.num_heads, rotary="half")
    if config.model_type != _GATED:
        return sites
    return (*sites, up_down_site("mlp.up_proj", "mlp.down_proj", config.intermediate_size))


TOWER = Architecture(
    name="qwen_tower",
    model_types=tuple(_MLP),
    blocks="blocks",
    matrices=lambda config, block: _names(config).matrices,
    sites=_sites,
    reads_pixels=True,
)
