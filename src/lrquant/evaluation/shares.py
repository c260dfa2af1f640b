"""Means of scores of single items, with their standard errors."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def share(name: str, values: Sequence[float]) -> dict[str, float]:
    """`name`: the mean over the items; `name`_stderr: its standard error, 0 of a single item."""
    scores = torch.tensor(values, dtype=torch.float64)
    error = float(scores.std() / len(values) ** 0.5) if len(values) > 1 else 0.0
    return {name: float(scores.mean()), f"{name}_stderr": error}
