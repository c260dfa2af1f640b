"""Block reconstruction losses: mean squared error and negative logarithm of the cosine."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean of ``(output - target)**2`` over (batch, tokens, hidden), float32 scalar."""
    return torch.nn.functional.mse_loss(output.float(), target.float())


def negative_log_cosine(output: Tensor, target: Tensor) -> Tensor:
    """``-log |mean over tokens of cos(output, target)|`` over the hidden axis, float32 scalar.

    LRQuant (ACL 2024), the NLC loss.
    """
    cosine = torch.nn.functional.cosine_similarity(output.float(), target.float(), dim=-1)
    return -torch.log(cosine.mean().abs())
