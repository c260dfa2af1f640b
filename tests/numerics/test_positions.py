"""Positions of weights on their grids: the codes that they begin at, and how they leave them."""

from __future__ import annotations

import pytest
import torch

from lrquant.numerics.grids.grid import Grid, Scales
from lrquant.numerics.grids.integer import IntegerGrid
from lrquant.numerics.positions import Positions
from lrquant.numerics.recipe import Recipe
from lrquant.numerics.weights import dequantize_weight, quantize_weight

OUT, IN, GROUP = 8, 48, 16


@pytest.fixture(params=[(2, False), (3, True), (4, False), (8, False)], ids=str)
def grid(request):
    bits, symmetric = request.param
    return IntegerGrid(bits, GROUP, symmetric)


@pytest.fixture
def learned(grid):
    """A weight with ties and zeros, the recipe of learned rounding and clipping, and its codes."""
    generator = torch.Generator().manual_seed(grid.bits)
    weight = torch.randn(OUT, IN, generator=generator)
    weight[:, ::7] = 0.0
    strength = torch.full((OUT, IN // GROUP), 0.8)
    offset = torch.rand(OUT, IN, generator=generator) - 0.5
    recipe = Recipe(upper=strength, lower=strength, offset=offset, columns=1 + offset[0])
    return weight, recipe, quantize_weight(weight, recipe, grid)


@pytest.fixture
def positions(learned, grid):
    weight, recipe, quantized = learned
    return Positions.of(weight, recipe, grid, quantized)


def test_they_begin_at_the_learned_codes(learned, grid, positions):
    _, _, quantized = learned
    assert not positions.shift().any()
    expected = dequantize_weight(quantized, grid)
    assert torch.equal(positions.weight(quantized.scale), expected)


def test_a_weight_of_another_code_than_its_nearest_begins_at_the_border(learned, grid, positions):
    weight, recipe, quantized = learned
    plain = Recipe(upper=recipe.upper, lower=recipe.lower, columns=recipe.columns)
    moved = quantized.codes - quantize_weight(weight, plain, grid).codes
    assert moved.any()
    positions.gradient = moved
    positions.descend_(0.03)
    assert torch.equal(positions.shift().float()[moved != 0], -moved[moved != 0])


def test_a_shift_is_what_the_recipe_takes(learned, grid, positions):
    """Bit for bit, and never by more than one code nor off the grid."""
    weight, recipe, quantized = learned
    generator = torch.Generator().manual_seed(0)
    positions.gradient = torch.randn(OUT, IN, generator=generator)
    positions.descend_(0.5)
    shift = positions.shift()
    assert set(shift.unique().tolist()) == {-1, 0, 1}
    recipe = Recipe(**{**vars(recipe), "shift": shift.float()})
    after = quantize_weight(weight, recipe, grid)
    assert torch.equal(after.codes, quantized.codes + shift)
    smallest, largest = grid.code_range
    assert after.codes.min() >= smallest and after.codes.max() <= largest
    assert torch.equal(positions.weight(quantized.scale), dequantize_weight(after, grid))


def test_gradients_are_those_of_no_rounding(learned, grid, positions):
    _, _, quantized = learned
    scale = quantized.scale.clone().requires_grad_()
    gradient = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(3))
    positions.weight(scale).backward(gradient)
    grouped = gradient.view(OUT, -1, GROUP)
    levels = quantized.codes.view_as(grouped) - quantized.zero_point[..., None]
    torch.testing.assert_close(scale.grad, (grouped * levels).sum(-1))
    before = positions.offsets.clone()
    positions.descend_(2**-7)
    assert torch.equal((before - positions.offsets).float(), gradient.sign() * 2**7)
    assert positions.gradient is None


def test_a_code_moves_by_one_at_most(positions, learned):
    _, _, quantized = learned
    for _ in range(5):
        positions.gradient = torch.ones(OUT, IN)
        positions.descend_(0.5)
    smallest = positions.grid.code_range[0]
    expected = (quantized.codes - 1).clamp(min=smallest)
    assert torch.equal(positions.codes(), expected)


def test_levels_need_not_be_even():
    """On a grid whose levels grow, each step counts as one."""
    grid = Squares(3, GROUP)
    weight = torch.tensor([[0.0, 0.4, 0.6, 1.0, 2.4, 2.6, 4.0, 9.0, 16.0, *[0.0] * 7]])
    quantized = quantize_weight(weight, Recipe(), grid)
    assert quantized.codes[0, :9].tolist() == [0, 0, 1, 1, 1, 2, 2, 3, 4]
    positions = Positions.of(weight, Recipe(), grid, quantized)
    assert not positions.shift().any()
    assert torch.equal(positions.weight(quantized.scale), dequantize_weight(quantized, grid))
    positions.gradient = -torch.ones(1, 16)
    positions.descend_(0.2)
    assert positions.shift()[0, :9].tolist() == [0, 1, 0, 0, 1, 0, 0, 0, 0]


class Squares(Grid):
    """Codes 0 to 4 for their squares, at a scale of a sixteenth of the largest value."""

    kind = "squares"
    code_range = (0, 4)

    def scales(self, low, high):
        scale = (high / 16).clamp(min=1e-5)
        return Scales(scale, torch.zeros_like(scale))

    def encode_(self, values, scales, offset=None):
        levels = torch.arange(5.0).square()
        far = ((values / scales.scale)[..., None] - levels).abs()
        return values.copy_(far.argmin(-1))

    def levels_(self, codes, zero_point):
        return codes.square_()

    def unclipped(self, ratios, zero_point):
        return torch.ones_like(ratios)
