"""Qwen3-Next: gated DeltaNets, and gated attention in every fourth block.

The MLP of a block is one of experts with one more for all, or dense.  A DeltaNet's q, k, v and gate
are rows of one linear, in turn for each of its heads of keys.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from lrquant.architectures import Architecture, delta_net
from lrquant.architectures.matrix import Matrix
from lrquant.architectures.mixture import Mixture, beside_a_gated_one, every_few
from lrquant.architectures.sites import Site

_INPUTS, _SMALL = ("in_proj_qkvz",), ("in_proj_ba",)


def _mixture(config: PretrainedConfig, block: int) -> Mixture | None:
    return beside_a_gated_one(config) if every_few(config, block) else None


def _matrices(config: PretrainedConfig, block: int) -> tuple[Matrix, ...]:
    return delta_net.matrices(config, block, _INPUTS, _mixture(config, block))


def _sites(config: PretrainedConfig, block: int) -> tuple[Site, ...]:
    return delta_net.sites(config, block, _INPUTS, _SMALL, _mixture(config, block))


def _kept(config: PretrainedConfig, block: int) -> tuple[str, ...]:
    return delta_net.kept(config, block, _SMALL, _mixture(config, block))


ARCHITECTURE = Architecture(
    name="qwen3_next",
    model_types=("qwen3_next",),
    blocks="model.layers",
    matrices=_matrices,
    sites=_sites,
    kept=_kept,
    windows_begin="stream",
    cumulative=True,
)
