"""Qwen3.5 and its successors, dense: gated DeltaNets, and gated attention in every fourth block."""

from __future__ import annotations

from transformers import PretrainedConfig

from lrquant.architectures import Architecture, delta_net
from lrquant.architectures.matrix import Matrix
from lrquant.architectures.sites import Site

_INPUTS, _SMALL = ("in_proj_qkv", "in_proj_z"), ("in_proj_b", "in_proj_a")


def _matrices(config: PretrainedConfig, block: int) -> tuple[Matrix, ...]:
    return delta_net.matrices(config, block, _INPUTS)


def _sites(config: PretrainedConfig, block: int) -> tuple[Site, ...]:
    return delta_net.sites(config, block, _INPUTS, _SMALL)


def _kept(config: PretrainedConfig, block: int) -> tuple[str, ...]:
    return delta_net.kept(config, block, _SMALL)


ARCHITECTURE = Architecture(
    name="qwen3_5",
    model_types=("qwen3_5_text",),
    blocks="model.layers",
    matrices=_matrices,
    sites=_sites,
    kept=_kept,
    windows_begin="stream",
)
