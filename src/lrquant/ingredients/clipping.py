"""Learnable weight clipping (LWC, OmniQuant): how much of a weight's range the grid spans."""

from __future__ import annotations

import torch
from torch import Tensor

from lrquant.numerics.affine import (
    dequantize_weight,
    effective_weight,
    group_extremes,
    quantize_weight,
    row_chunks,
)

PUBLISHED_LOGIT = 4.0  # sigmoid(4) = 0.982
SEARCHED_STRENGTHS = tuple(step / 20 for step in range(19, 7, -1))  # 0.95, 0.9, … 0.4


def clipping_parameters(
    linear: str, rows: int, groups: int, start: float | Tensor, device: torch.device
) -> dict[str, Tensor]:
    """Two logits a row and group, (out, groups) float32: `start`, or one a group."""
    return {
        f"lwc.{linear}.{side}": torch.zeros((rows, groups), device=device) + start
        for side in ("upper", "lower")
    }


def clipping_strengths(
    parameters: dict[str, Tensor], linear: str
) -> tuple[Tensor | None, Tensor | None]:
    """Fractions of the largest and smallest weight that the grid reaches, in (0, 1)."""
    if f"lwc.{linear}.upper" not in parameters:
        return None, None
    return (
        torch.sigmoid(parameters[f"lwc.{linear}.upper"]),
        torch.sigmoid(parameters[f"lwc.{linear}.lower"]),
    )


@torch.no_grad()
def searched_logits(
    weight: Tensor,
    row_factor: Tensor | None,
    column_factor: Tensor | None,
    importance: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
) -> Tensor:
    """The logit, one for both sides, with the smallest weighted error of each row and group.

    ``sum over in of importance * (W - W^)**2`` for a weight (out, in), its factors applied, and the
    mean squared inputs (in,): what a diagonal of the layer's Hessian says of its output's error.
    Tries `SEARCHED_STRENGTHS` and the published start, to which ties go.  (out, groups) float32.
    """
    groups = weight.shape[1] // group_size
    logits = torch.empty((weight.shape[0], groups), device=weight.device)
    tried = [PUBLISHED_LOGIT, *(_logit(strength) for strength in SEARCHED_STRENGTHS)]
    for rows in row_chunks(weight):
        row = None if row_factor is None else row_factor[rows]
        scaled = effective_weight(weight[rows], row, column_factor)
        best = torch.full((len(scaled), groups), torch.inf, device=weight.device)
        chosen = torch.full_like(best, PUBLISHED_LOGIT)
        extremes = group_extremes(scaled, group_size)
        for logit in tried:
            strength = torch.full_like(best, logit).sigmoid_()
            quantized = quantize_weight(
                scaled, None, None, strength, strength, bits, group_size, symmetric, extremes
            )
            error = dequantize_weight(*quantized).sub_(scaled).square_().mul_(importance)
            error = error.view(len(scaled), groups, group_size).sum(-1)
            better = error < best
            best = torch.where(better, error, best)
            chosen.masked_fill_(better, logit)
        logits[rows] = chosen
    return logits


def _logit(strength: float) -> float:
    return float(torch.logit(torch.tensor(strength, dtype=torch.float64)))
