"""The start of learning: of several strengths of it, the one at which a block errs least.

Scales that move outliers into weights cost weights what activations gain.  How much is worth it
depends on the bits of both and on the block, so it is tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lrquant.ingredients.ingredient import Ingredient
from lrquant.learn.block_data import BlockData, Runner
from lrquant.learn.fit import Learnable

TRIED_STEPS = 4
_SMALLEST = 1e-12


def strengths_of(ingredients: Sequence[Ingredient]) -> tuple[float, ...]:
    """What strengths of a start are tried; none where every ingredient has but one start."""
    return next((each.strengths for each in ingredients if each.strengths), ())


@torch.no_grad()
def begin_at_best(
    view: Learnable,
    runner: Runner,
    data: BlockData,
    kind: str,
    strengths: Sequence[float],
    begin: Callable[[float], None],
) -> float:
    """Let the view start at the strength whose loss is least, the first of equals; that strength.

    `begin` sets the view's parameters to a start.  Losses are over the samples of a few steps,
    every term of `kind` by its share of what it is at the first strength at which it is finite.
    """
    first: Tensor | None = None
    best, least, parameters = strengths[0], math.inf, view.parameters
    for strength in strengths:
        begin(strength)
        terms = data.terms(runner, view.tensors(), kind, steps=TRIED_STEPS)
        if first is None and torch.isfinite(terms).all():
            first = terms.clamp(min=_SMALLEST)
        score = math.inf if first is None else float((terms / first).sum())
        if strength == strengths[0] or score < least:
            best, least, parameters = strength, score, view.parameters
    view.parameters = parameters
    return best
