"""Qwen3-Next without experts: gated DeltaNets, and gated attention in every fourth block.

A DeltaNet's q, k, v and gate are rows of one linear, in turn for each of its heads of keys.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from lrquant.architectures import Architecture, delta_net
from lrquant.architectures.matrix import Matrix
from lrquant.architectures.sites import Site

_INPUTS, _SMALL = ("in_proj_qkvz",), ("in_proj_ba",)


def _matrices(config: PretrainedConfig, block: int) -> tuple[Matrix, ...]:
    return delta_net.matrices(config, block, _INPUTS)


def _sites(config: PretrainedConfig, block: int) -> tuple[Site, ...]:
    return delta_net.sites(config, block, _INPUTS, _SMALL)


def _kept(config: PretrainedConfig, block: int) -> tuple[str, ...]:
    return delta_net.kept(config, block, _SMALL)


def _refusal(config: PretrainedConfig) -> str | None:
    step, dense = config.decoder_sparse_step, config.mlp_only_layers
    for block in range(config.num_hidden_layers):
        if config.num_experts > 0 and block not in dense and not (block + 1) % step:
            return f"block {block} has experts, which this family's declaration does not cover yet"
    return None


ARCHITECTURE = Architecture(
    name="qwen3_next",
    model_types=("qwen3_next",),
    blocks="model.layers",
    matrices=_matrices,
    sites=_sites,
    kept=_kept,
    refusal=_refusal,
    windows_begin="stream",
)
