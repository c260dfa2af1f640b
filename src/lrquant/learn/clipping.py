"""Learnable weight clipping (LWC, OmniQuant): how much of a weight's range the grid spans."""

from __future__ import annotations

import torch
from torch import Tensor

INITIAL_LOGIT = 4.0  # sigmoid(4) = 0.982


def clipping_parameters(
    linear: str, rows: int, groups: int, device: torch.device
) -> dict[str, Tensor]:
    """Two logits a row and group, (out, groups) float32, at the published start."""
    return {
        f"lwc.{linear}.{side}": torch.full((rows, groups), INITIAL_LOGIT, device=device)
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
