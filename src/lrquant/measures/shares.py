"""Means of scores of single items, with their standard errors, and how many the items are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def share(name: str, values: Sequence[float]) -> dict[str, float]:
    """`name`: the mean over the items; `name`_stderr: its standard error, of more than one."""
    scores = torch.tensor(values, dtype=torch.float64)
    found = {name: float(scores.mean())}
    if len(values) > 1:
        found[f"{name}_stderr"] = float(scores.std() / len(values) ** 0.5)
    return found


def counted(measured: int, whole: int | None, unit: str) -> dict[str, Any]:
    """How many items a measure is of, of how many that its set has, as results.json says it."""
    return {"measured": measured, "of": measured if whole is None else whole, "unit": unit}


def of_how_many(items: dict[str, Any] | None) -> str:
    """ "n = 4 of 1838" where a measure is of a part of its set; else nothing."""
    if not items or items["measured"] >= items["of"]:
        return ""
    return f"n = {items['measured']} of {items['of']}"
