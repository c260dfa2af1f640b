"""The tower of Kimi K2.5: LayerNorms, RoPE over both sides of a picture, packed patches."""

from lrquant.architectures import Architecture
from lrquant.architectures.encoder import Names

_NAMES = Names(
    "norm1",
    ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    "attn.proj",
    "norm2",
    ("mlp.fc1",),
    "mlp.fc2",
)

TOWER = Architecture(
    name="kimi_tower",
    model_types=("kimi_k25_vision",),
    blocks="layers",
    matrices=lambda config, block: _NAMES.matrices,
    sites=lambda config, block: _NAMES.sites(
        config.hidden_size, config.num_attention_heads, rotary="half"
    ),
    reads_pixels=True,
)
