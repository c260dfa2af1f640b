"""Summaries of losses and of divergences from a reference, over all positions and along them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

LARGEST_EXPONENT = 700.0


@dataclass(frozen=True)
class Span:
    """The agreement of the positions ``first..last`` of each window, each from so many tokens."""

    first: int
    last: int
    kl_mean: float
    kl_p99: float
    same_top: float
    perplexity_ratio: float


@dataclass(frozen=True)
class Divergences:
    """How far a model's next-token distributions are from a reference's.

    `kl_mean` and `kl_p99`: mean and 99th percentile of ``KL(reference || model)`` in nats, the mean
    with its standard error over the windows; `same_top`: share of positions at which both prefer
    one token; `perplexity_ratio`: the model's perplexity by the reference's.
    """

    kl_mean: float
    kl_p99: float
    same_top: float
    perplexity_ratio: float
    kl_mean_stderr: float | None
    positions: list[Span]


def divergences(losses: Tensor, expected: Tensor, divergence: Tensor, same: Tensor) -> Divergences:
    """What is said of per-position values (windows, positions) or (positions,), float64.

    `positions` has the same along the window: position p predicts from p tokens, and each span has
    twice as many as the one before; samples of several lengths have none.
    """
    values = (losses, expected, divergence, same)
    positions: list[Span] = []
    first = 1
    while losses.dim() == 2 and first <= losses.shape[1]:
        last = min(2 * first - 1, losses.shape[1])
        span = slice(first - 1, last)
        positions.append(Span(first, last, *_summary(*(each[:, span] for each in values))))
        first = last + 1
    return Divergences(*_summary(*values), window_error(divergence), positions)


def perplexity(losses: Tensor) -> float:
    """``exp`` of the mean of losses in nats; infinite where that is no float."""
    mean = float(losses.mean())
    return math.exp(mean) if mean < LARGEST_EXPONENT else math.inf


def perplexity_error(losses: Tensor) -> float | None:
    """Standard error of the perplexity, ``exp(mean) s / sqrt(n)`` of the means of n windows."""
    error = window_error(losses)
    return None if error is None else perplexity(losses) * error


def window_error(values: Tensor) -> float | None:
    """Standard error of the mean of (windows, positions), from window to window.

    None of a single window, and where samples have several lengths.
    """
    if values.dim() == 1 or len(values) < 2:
        return None
    means = values.mean(1)
    return float(means.std()) / len(means) ** 0.5


def _summary(
    losses: Tensor, expected: Tensor, divergence: Tensor, same: Tensor
) -> tuple[float, float, float, float]:
    return (
        float(divergence.mean()),
        _percentile(divergence.flatten(), 0.99),
        float(same.mean()),
        perplexity(losses - expected),
    )


def _percentile(values: Tensor, share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed."""
    rank = max(1, math.ceil(share * values.numel()))
    return float(values.kthvalue(rank).values)
