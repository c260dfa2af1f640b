"""Means of scores of single items, with their standard errors, and how many the items are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lrquant.runs.results import Entry


@dataclass(frozen=True)
class Share:
    """A mean over items and its standard error, None where a single item tells of none."""

    mean: float
    stderr: float | None

    def named(self, name: str) -> dict[str, float]:
        """As results.json has it: `name`, and `name`_stderr if there is one."""
        error = {} if self.stderr is None else {f"{name}_stderr": self.stderr}
        return {name: self.mean, **error}


def share(values: Sequence[float]) -> Share:
    """The mean of one value an item; ``s / sqrt(n)`` of more than one is its standard error."""
    import torch

    scores = torch.tensor(values, dtype=torch.float64)
    error = float(scores.std() / len(values) ** 0.5) if len(values) > 1 else None
    return Share(float(scores.mean()), error)


def counted(measured: int, whole: int | None, unit: str) -> dict[str, int | str]:
    """How many items a measure is of, of how many that its set has, as results.json says it."""
    return {"measured": measured, "of": measured if whole is None else whole, "unit": unit}


def of_how_many(items: Entry) -> str:
    """ "n = 4 of 1838" where a measure is of a part of its set; else nothing."""
    measured, whole = items.get("measured"), items.get("of")
    if not isinstance(measured, int) or not isinstance(whole, int) or measured >= whole:
        return ""
    return f"n = {measured} of {whole}"
