"""Attention on quantised Q, K and V, under a name that transformers knows."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lrquant.model.device import dtype_name
from lrquant.numerics.grids.grid import Grid
from lrquant.numerics.hadamard import hadamard
from lrquant.numerics.tokens import fake_quantize_tokens

_QUANTIZED = "_lrquant_quantized"
_BESIDE = ("position_bias", "cache")  # of transformers' attention, seldom given


def mark_quantized(states: Tensor) -> Tensor:
    """Say of states that they lie on their grid: attention takes them as they are."""
    setattr(states, _QUANTIZED, True)
    return states


def attention_config(module: nn.Module) -> PretrainedConfig | None:
    """The configuration from which a block's, or an attention's own, implementation is taken.

    None where nothing in the block has one, as in one without attention.
    """
    configs = [getattr(each, "config", None) for each in module.modules()]
    return next((config for config in configs if isinstance(config, PretrainedConfig)), None)


def with_own_config(module: nn.Module) -> PretrainedConfig:
    """The configuration that a module's attention reads, from now on its own, and no other's."""
    shared = attention_config(module)
    assert shared is not None
    own = copy.copy(shared)
    for each in module.modules():
        if getattr(each, "config", None) is shared:
            setattr(each, "config", own)  # noqa: B010
    return own


def attention_name(
    grid: Grid | None,
    dtype: torch.dtype | None = None,
    compiled: bool = False,
    rotated: bool = False,
) -> str:
    """Register (once) and name the attention that puts Q, K and V on a grid, or none.

    Its products run in `dtype`, or in that of the queries; its quantizers may be `compiled`.
    Queries and keys are `rotated` by a Hadamard matrix before, which leaves their products.
    """
    kind = "own" if dtype is None else dtype_name(dtype)
    on = "float" if grid is None else f"{grid.kind}{grid.bits}{'s' if grid.symmetric else 'a'}"
    name = f"lrquant_{on}_{kind}{'_compiled' if compiled else ''}{'_rotated' if rotated else ''}"
    AttentionInterface.register(name, partial(_attention, grid, dtype, compiled, rotated))
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


def _attention(
    grid: Grid | None,
    dtype: torch.dtype | None,
    compiled: bool,
    rotated: bool,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention on quantised Q, K, V (batch, heads, tokens, head_dim)."""
    dtype = dtype or query.dtype
    if rotated:
        query, key = (
            states if getattr(states, _QUANTIZED, False) else hadamard(states)
            for states in (query, key)
        )
    if grid is None:
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    else:
        query, key, value = (
            states.to(dtype)
            if getattr(states, _QUANTIZED, False)
            else fake_quantize_tokens(states, grid, dtype, compiled=compiled)
            for states in (query, key, value)
        )
    if arguments.get("softcap") is None and arguments.get("s_aux") is None:
        beside = (attention_mask, *(arguments.get(name) for name in _BESIDE))
        plain = all(each is None for each in beside) and len(query) == len(key)
        if plain and query.shape[2] == 1 < query.shape[1] // key.shape[1]:
            return _of_one_token(query, key, value, **arguments), None
        return sdpa_attention_forward(module, query, key, value, attention_mask, **arguments)
    return _spelled_out(module, query, key, value, attention_mask, **arguments), None


def _of_one_token(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: object,
) -> Tensor:
    """Attention of a token (batch, heads, 1, head_dim) to all keys (batch, fewer heads, keys, …).

    Heads that share keys are given as so many tokens of one head: torch's product of one query in
    bfloat16 takes eight times as long on a CPU.  The result is (batch, 1, heads, head_dim).
    """
    batch, heads, _, head_dim = query.shape
    tokens = query.reshape(batch, key.shape[1], -1, head_dim)
    output = scaled_dot_product_attention(tokens, key, value, None, dropout, scale=scaling)
    return output.reshape(batch, 1, heads, -1)


def _spelled_out(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: object,
) -> Tensor:
    """Attention whose scores x become ``c tanh(x / c)`` or that has sinks: torch's has neither.

    `s_aux` (heads,) are scores of a further key of each head whose value is 0.  The result is
    (batch, tokens, heads, head_dim).
    """
    repeats = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(repeats, dim=1) for states in (key, value))
    scores = query @ key.transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    scores = _masked(scores.to(torch.promote_types(scores.dtype, torch.float32)), mask, module)
    keys = scores.shape[-1]
    if s_aux is not None:
        sinks = s_aux.to(scores.dtype).reshape(1, -1, 1, 1)
        scores = torch.cat([scores, sinks.expand(*scores.shape[:-1], 1)], dim=-1)
    weights = scores.softmax(dim=-1)[..., :keys].to(value.dtype)
    return (weights @ value).transpose(1, 2).contiguous()


def _masked(scores: Tensor, mask: Tensor | None, module: nn.Module) -> Tensor:
    """Scores (batch, heads, tokens, keys) under what transformers makes for torch's attention.

    A mask of truth values or to be added; None: each token sees itself and those before it, or, one
    alone and where attention is not causal, all.
    """
    tokens, keys = scores.shape[-2:]
    if mask is None:
        if tokens == 1 or not getattr(module, "is_causal", True):
            return scores
        mask = torch.ones(tokens, keys, dtype=torch.bool, device=scores.device)
        mask = mask.tril(keys - tokens)
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores + mask
