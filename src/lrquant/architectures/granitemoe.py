"""Granite 3 with experts, and with an MLP beside them: published in one tensor a block."""

from __future__ import annotations

from transformers import PretrainedConfig

from lrquant.architectures import Architecture, decoder, shared_mlp
from lrquant.architectures.matrix import Matrix
from lrquant.architectures.mixture import attention_matrices, rotary_attention_sites
from lrquant.architectures.sites import Site

_attention_sites = rotary_attention_sites("half")


def _matrices(config: PretrainedConfig, block: int) -> tuple[Matrix, ...]:
    return *attention_matrices(config, block), *shared_mlp.matrices(config)


def _sites(config: PretrainedConfig, block: int) -> tuple[Site, ...]:
    return *_attention_sites(config, block), *shared_mlp.sites(config)


ARCHITECTURE = Architecture(
    name="granitemoe",
    model_types=("granitemoe", "granitemoeshared"),
    blocks="model.layers",
    matrices=_matrices,
    sites=_sites,
    kept=lambda config, block: shared_mlp.kept(config),
    assumes=decoder.WHOLE_ROTARY,
)
