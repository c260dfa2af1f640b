"""Compiled quantizers against the same functions as they are."""

from __future__ import annotations

import pytest
import torch

from lrquant.numerics.compiled import why_not
from lrquant.numerics.grids.integer import IntegerGrid
from lrquant.numerics.recipe import Recipe
from lrquant.numerics.tokens import fake_quantize_tokens
from lrquant.numerics.weights import fake_quantize_weight

CPU = torch.device("cpu")
NEEDS_COMPILER = pytest.mark.skipif(why_not(CPU) is not None, reason=str(why_not(CPU)))


def uniform(*shape: int, low: float, high: float, seed: int = 0) -> torch.Tensor:
    values = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return (low + (high - low) * values).requires_grad_()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def both(function, leaves, weights):
    """Value and gradients, as it is and compiled."""
    results = []
    for compiled in (False, True):
        output = function(compiled)
        gradients = torch.autograd.grad((output.float() * weights).sum(), leaves)
        results.append((output.detach(), gradients))
    return results


@NEEDS_COMPILER
def test_weights(assert_near):
    """All that a recipe has at once, with scales as bfloat16 stores them."""
    rows, columns = 24, 64
    recipe = {
        "rows": uniform(rows, low=0.5, high=2.0, seed=1),
        "columns": uniform(columns, low=0.5, high=2.0, seed=2),
        "upper": uniform(rows, 4, low=0.6, high=1.0, seed=3),
        "lower": uniform(rows, 4, low=0.6, high=1.0, seed=4),
        "offset": uniform(rows, columns, low=-0.5, high=0.5, seed=5),
        "gain": uniform(rows, 4, low=0.9, high=1.1, seed=6),
    }
    weight, grid = normal(rows, columns).bfloat16(), IntegerGrid(4, 16, False, torch.bfloat16)
    (plain, own), (fused, others) = both(
        lambda compiled: fake_quantize_weight(
            weight, Recipe(**recipe), grid, torch.bfloat16, compiled=compiled
        ),
        list(recipe.values()),
        normal(rows, columns, seed=7),
    )
    assert torch.equal(plain, fused), "the same codes and scales, bit for bit"
    for name, expected, found in zip(recipe, own, others, strict=True):
        assert_near(found, expected, name)
    scaled = weight.float() * recipe["rows"][:, None] * recipe["columns"]
    assert (plain.float() - scaled).abs().max() > 0.05, "or nothing was rounded"


@NEEDS_COMPILER
def test_tokens(assert_near):
    values, clip = normal(3, 7, 32).requires_grad_(), torch.tensor([0.7, 0.9], requires_grad=True)
    grid = IntegerGrid(4, 16)
    (plain, own), (fused, others) = both(
        lambda compiled: fake_quantize_tokens(
            values, grid, torch.bfloat16, clip, compiled=compiled
        ),
        [values, clip],
        normal(3, 7, 32, seed=7),
    )
    assert torch.equal(plain, fused)
    for name, expected, found in zip(("values", "clip"), own, others, strict=True):
        assert_near(found, expected, name)
