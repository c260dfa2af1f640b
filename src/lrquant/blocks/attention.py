"""Scaled dot-product attention on quantised Q, K and V, under a name that transformers knows."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lrquant.model.device import dtype_name
from lrquant.numerics.grids.grid import Grid
from lrquant.numerics.tokens import fake_quantize_tokens

_QUANTIZED = "_lrquant_quantized"


def mark_quantized(states: Tensor) -> Tensor:
    """Say of states that they lie on their grid: attention takes them as they are."""
    setattr(states, _QUANTIZED, True)
    return states


def attention_config(module: nn.Module) -> PretrainedConfig:
    """The configuration from which a block's, or an attention's own, implementation is taken."""
    configs = [getattr(each, "config", None) for each in module.modules()]
    return next(config for config in configs if isinstance(config, PretrainedConfig))


def with_own_config(module: nn.Module) -> PretrainedConfig:
    """The configuration that a module's attention reads, from now on its own, and no other's."""
    shared = attention_config(module)
    own = copy.copy(shared)
    for each in module.modules():
        if getattr(each, "config", None) is shared:
            setattr(each, "config", own)  # noqa: B010
    return own


def attention_name(grid: Grid | None, dtype: torch.dtype | None = None) -> str:
    """Register (once) and name the attention that puts Q, K and V on a grid, or none.

    Its products run in `dtype`, or in that of the queries.
    """
    kind = "own" if dtype is None else dtype_name(dtype)
    on = "float" if grid is None else f"{grid.kind}{grid.bits}{'s' if grid.symmetric else 'a'}"
    name = f"lrquant_{on}_{kind}"
    AttentionInterface.register(name, partial(_attention, grid, dtype))
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


def _attention(
    grid: Grid | None,
    dtype: torch.dtype | None,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention on quantised Q, K, V (batch, heads, tokens, head_dim)."""
    dtype = dtype or query.dtype
    if grid is None:
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    else:
        query, key, value = (
            states.to(dtype)
            if getattr(states, _QUANTIZED, False)
            else fake_quantize_tokens(states, grid, dtype)
            for states in (query, key, value)
        )
    return sdpa_attention_forward(module, query, key, value, attention_mask, **arguments)
