"""Terms of the block loss: mean squared error, negative logarithm of the cosine, and others'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import torch
from torch import Tensor

from lrquant.config.declarations import declarations_of_others
from lrquant.errors import LRQuantError

Term: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Loss:
    """A term by its name; `function` makes of output, target (batch, tokens, hidden) and the
    tokens' weights (batch, tokens) or None a float32 scalar.  `compiles` says that torch.compile
    and torch.func take it."""

    name: str
    function: Term
    compiles: bool = False


@cache
def losses() -> dict[str, Loss]:
    """Every term by name: those here, and those that other packages declare."""
    own = [Loss("mse", mean_squared_error, True), Loss("nlc", negative_log_cosine, True)]
    return {loss.name: loss for loss in (*own, *declarations_of_others("losses", Loss))}


def terms_of(kind: str) -> list[Loss]:
    """The terms of a loss, their names joined by +; LRQuantError for one that nobody declares."""
    terms = losses()
    for name in kind.split("+"):
        if name not in terms:
            raise LRQuantError(
                f"loss {kind!r}: use one of {', '.join(terms)}, or several joined by +"
            )
    return [terms[name] for name in kind.split("+")]


def mean_squared_error(output: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean of ``(output - target)**2`` over (batch, tokens, hidden), float32 scalar.

    Tokens count as their `weights` (batch, tokens) say.
    """
    output, target = output.float(), target.float()
    if weights is None:
        return torch.nn.functional.mse_loss(output, target)
    return _weighted_mean((output - target).square().mean(-1), weights)


def negative_log_cosine(output: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """``-log |mean over tokens of cos(output, target)|`` over the hidden axis, float32 scalar.

    Tokens count as their `weights` (batch, tokens) say.

    LRQuant (ACL 2024), the NLC loss.  Computed from ``1 - cos = |x/|x| - y/|y||**2 / 2``, which
    keeps its digits where outputs are nearly equal: float32 cosines end at 6e-8 from 1.
    """
    output, target = (
        torch.nn.functional.normalize(states.float(), dim=-1, eps=1e-8)
        for states in (output, target)
    )
    distances = (output - target).square().sum(-1)
    distance = (distances.mean() if weights is None else _weighted_mean(distances, weights)) / 2
    near = -torch.log1p(-distance.clamp(max=0.5))
    return torch.where(distance < 0.5, near, -torch.log((1 - distance).abs()))


def kl_divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """``KL(softmax(reference) || softmax(logits))`` in nats, over the last axis: (...).

    Of logits (..., vocabulary), float32 and differentiable in both.
    """
    logits, reference = logits.log_softmax(-1), reference.log_softmax(-1)
    return torch.linalg.vecdot(reference.exp(), reference - logits)


def _weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights).sum() / weights.sum()
