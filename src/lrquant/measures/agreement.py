"""How far next-token distributions are from a reference's, over all positions and along them."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

LARGEST_EXPONENT = 700.0


def agreement(
    losses: Tensor, reference_losses: Tensor, divergences: Tensor, same: Tensor
) -> dict[str, Any]:
    """What is said of per-position values (windows, positions) or (positions,), float64.

    `kl_mean` and `kl_p99`: mean and 99th percentile of ``KL(reference || model)`` in nats;
    `same_top`: share of positions at which both prefer one token; `perplexity_ratio`: the model's
    perplexity by the reference's.  `positions` has the same along the window: position p predicts
    from p tokens, and each entry spans ``first..last``, twice as many as the one before;
    samples of several lengths have none.
    """
    if losses.dim() == 1:
        return _summary(losses, reference_losses, divergences, same)
    positions = []
    first = 1
    while first <= losses.shape[1]:
        last = min(2 * first - 1, losses.shape[1])
        part = slice(first - 1, last)
        of_part = (values[:, part] for values in (losses, reference_losses, divergences, same))
        positions.append({"first": first, "last": last, **_summary(*of_part)})
        first = last + 1
    return {**_summary(losses, reference_losses, divergences, same), "positions": positions}


def perplexity(losses: Tensor) -> float:
    """``exp`` of the mean of losses in nats; infinite where that is no float."""
    mean = float(losses.mean())
    return math.exp(mean) if mean < LARGEST_EXPONENT else math.inf


def _summary(
    losses: Tensor, reference_losses: Tensor, divergences: Tensor, same: Tensor
) -> dict[str, float]:
    return {
        "kl_mean": float(divergences.mean()),
        "kl_p99": _percentile(divergences.flatten(), 0.99),
        "same_top": float(same.mean()),
        "perplexity_ratio": perplexity(losses - reference_losses),
    }


def _percentile(values: Tensor, share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed."""
    rank = max(1, math.ceil(share * values.numel()))
    return float(values.kthvalue(rank).values)
