"""Block reconstruction losses: mean squared error and negative logarithm of the cosine."""

from __future__ import annotations

import torch
from torch import Tensor


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


def _weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights).sum() / weights.sum()
