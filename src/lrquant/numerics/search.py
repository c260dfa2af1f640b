"""A search for the range of each group of a weight with the least weighted error."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from lrquant.numerics.chunks import row_chunks
from lrquant.numerics.grids.grid import Grid
from lrquant.numerics.recipe import Recipe, scaled_weight
from lrquant.numerics.weights import dequantize_weight, group_extremes, quantize_weight

PUBLISHED_LOGIT = 4.0  # sigmoid(4) = 0.982
SEARCHED_STRENGTHS = tuple(step / 20 for step in range(19, 7, -1))  # 0.95, 0.9, … 0.4


@torch.no_grad()
def searched_logits(weight: Tensor, recipe: Recipe, importance: Tensor, grid: Grid) -> Tensor:
    """The logit, one for both sides, with the smallest weighted error of each row and group.

    ``sum over in of importance * (W - W^)**2`` for a weight (out, in), the recipe's rows and
    columns applied, and the mean squared inputs (in,): what a diagonal of the layer's Hessian says
    of its output's error.  Tries `SEARCHED_STRENGTHS` and the published start, to which ties go.
    (out, groups) float32.
    """
    grid = dataclasses.replace(grid, scale_dtype=torch.float32)
    groups = weight.shape[1] // grid.size(weight.shape[1])
    logits = torch.empty((weight.shape[0], groups), device=weight.device)
    tried = [PUBLISHED_LOGIT, *(_logit(strength) for strength in SEARCHED_STRENGTHS)]
    for rows in row_chunks(weight):
        scaled = scaled_weight(weight[rows], recipe.of_rows(rows))
        best = torch.full((len(scaled), groups), torch.inf, device=weight.device)
        chosen = torch.full_like(best, PUBLISHED_LOGIT)
        extremes = group_extremes(scaled, grid)
        for logit in tried:
            strength = torch.full_like(best, logit).sigmoid_()
            clipped = Recipe(upper=strength, lower=strength)
            quantized = quantize_weight(scaled, clipped, grid, extremes)
            error = dequantize_weight(quantized, grid).sub_(scaled).square_().mul_(importance)
            error = grid.grouped(error).sum(-1)
            better = error < best
            best = torch.where(better, error, best)
            chosen.masked_fill_(better, logit)
        logits[rows] = chosen
    return logits


def _logit(strength: float) -> float:
    return float(torch.logit(torch.tensor(strength, dtype=torch.float64)))
