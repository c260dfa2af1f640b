"""Qwen3.5 and its successors: gated DeltaNets, and gated attention in every fourth block.

The MLP of each block is dense, or one of experts with one more for all.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from lrquant.architectures import Architecture, delta_net
from lrquant.architectures.matrix import Matrix
from lrquant.architectures.mixture import Mixture, beside_a_gated_one
from lrquant.architectures.sites import Site

_SPARSE = "qwen3_5_moe_text"
_INPUTS, _SMALL = ("in_proj_qkv", "in_proj_z"), ("in_proj_b", "in_proj_a")


def _mixture(config: PretrainedConfig) -> Mixture | None:
    return beside_a_gated_one(config) if config.model_type == _SPARSE else None


def _matrices(config: PretrainedConfig, block: int) -> tuple[Matrix, ...]:
    return delta_net.matrices(config, block, _INPUTS, _mixture(config))


def _sites(config: PretrainedConfig, block: int) -> tuple[Site, ...]:
    return delta_net.sites(config, block, _INPUTS, _SMALL, _mixture(config))


def _kept(config: PretrainedConfig, block: int) -> tuple[str, ...]:
    return delta_net.kept(config, block, _SMALL, _mixture(config))


ARCHITECTURE = Architecture(
    name="qwen3_5",
    model_types=("qwen3_5_text", "qwen3_5_moe_text"),
    blocks="model.layers",
    matrices=_matrices,
    sites=_sites,
    kept=_kept,
    windows_begin="stream",
    cumulative=True,
)
