"""ViT image classifiers."""

from __future__ import annotations

from transformers import AutoModelForImageClassification, PretrainedConfig

from lrquant.architectures import Architecture
from lrquant.architectures.encoder import Names
from lrquant.architectures.matrix import Matrix
from lrquant.architectures.sites import Site

NAMES = Names(
    attention_norm="layernorm_before",
    qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    output="attention.o_proj",
    mlp_norm="layernorm_after",
    mlp_inputs=("mlp.fc1",),
    mlp_output="mlp.fc2",
)


def matrices(config: PretrainedConfig, block: int) -> tuple[Matrix, ...]:
    """The six linears of a block."""
    return NAMES.matrices


def sites(config: PretrainedConfig, block: int) -> tuple[Site, ...]:
    """All sites."""
    return NAMES.sites(config.hidden_size, config.num_attention_heads)


ARCHITECTURE = Architecture(
    name="vit",
    model_types=("vit",),
    blocks="vit.layers",
    matrices=matrices,
    sites=sites,
    auto_class=AutoModelForImageClassification,
    reads_pixels=True,
)
