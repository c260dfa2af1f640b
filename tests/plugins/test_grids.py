"""The contract of a grid, over every kind here and the one of the page."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lrquant import quantize
from lrquant.errors import LRQuantError
from lrquant.numerics.grids.grid import Grid, Scales, grid_of
from lrquant.numerics.recipe import Recipe
from lrquant.numerics.tokens import fake_quantize_tokens
from lrquant.numerics.weights import (
    dequantize_weight,
    fake_quantize_weight,
    group_extremes,
    quantize_weight,
    reference_weight,
)

PAGE = "add-a-grid.md"
KINDS = pytest.mark.parametrize("kind", ["int", "squares"])
SYMMETRY = pytest.mark.parametrize("symmetric", [False, True])
BITS = pytest.mark.parametrize("bits", [2, 3, 4, 8])
ROWS, COLUMNS, GROUP = 6, 32, 16


@pytest.fixture
def make_grid(installed):
    installed(PAGE)

    def make(kind: str, bits: int, symmetric: bool = True, group: int | None = GROUP) -> Grid:
        return grid_of(kind)(bits, group, symmetric)

    return make


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def every_code(grid: Grid) -> torch.Tensor:
    smallest, largest = grid.code_range
    return torch.arange(smallest, largest + 1, dtype=torch.float32)[None]


@KINDS
@SYMMETRY
@BITS
def test_codes_survive_a_round_trip_through_values(kind, bits, symmetric, make_grid):
    grid = make_grid(kind, bits, symmetric)
    scales = grid.scales(torch.tensor([[-1.5]]), torch.tensor([[1.0]]))
    codes = every_code(grid)
    assert torch.equal(grid.encode_(grid.decode_(codes.clone(), scales), scales), codes)
    assert codes.to(grid.stored_dtype).float().equal(codes), "a code that the dtype does not hold"


@KINDS
@SYMMETRY
@BITS
def test_every_value_goes_to_the_nearest(kind, bits, symmetric, make_grid):
    grid = make_grid(kind, bits, symmetric)
    scales = grid.scales(torch.tensor([[-1.5]]), torch.tensor([[1.0]]))
    levels = grid.decode_(every_code(grid), scales)
    values = torch.linspace(-1.5, 1.0, 999)[None]
    rounded = grid.decode_(grid.encode_(values.clone(), scales), scales)
    nearest = (values[..., None] - levels[:, None]).abs().amin(-1)
    assert torch.allclose((values - rounded).abs(), nearest, atol=1e-6)
    assert (levels == 0).any(), "0 is a value"


@KINDS
@SYMMETRY
@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_what_is_frozen_is_what_was_learned(kind, symmetric, gain, scale_dtype, make_grid):
    grid = dataclasses.replace(make_grid(kind, 4, symmetric), scale_dtype=scale_dtype)
    weight, groups = random(ROWS, COLUMNS), (ROWS, COLUMNS // GROUP)
    recipe = Recipe(
        rows=random(ROWS, seed=1).exp(),
        columns=random(COLUMNS, seed=2).exp(),
        upper=torch.rand(groups, generator=torch.Generator().manual_seed(3)),
        offset=random(ROWS, COLUMNS, seed=4).clamp(-0.5, 0.5),
        gain=random(*groups, seed=5).exp() if gain else None,
    )
    frozen = dequantize_weight(quantize_weight(weight, recipe, grid), grid)
    assert torch.equal(fake_quantize_weight(weight, recipe, grid), frozen)
    assert torch.equal(reference_weight(weight, recipe, grid), frozen)
    other = dataclasses.replace(recipe, rows=None)
    assert not torch.equal(fake_quantize_weight(weight, other, grid), frozen)


@KINDS
@SYMMETRY
def test_gradients_are_those_of_the_rounding_left_out(kind, symmetric, make_grid):
    """With levels held still, by finite differences of ``scale (level + v / scale)``."""
    grid = make_grid(kind, 4, symmetric)
    weight, groups = random(ROWS, COLUMNS), (ROWS, COLUMNS // GROUP)
    seed = random(ROWS, COLUMNS, seed=9).double()
    leaves = {
        "rows": random(ROWS, seed=1).exp(),
        "columns": random(COLUMNS, seed=2).exp(),
        "upper": torch.full(groups, 0.8),
        "lower": torch.full(groups, 0.7),
        "offset": torch.zeros(ROWS, COLUMNS),
        "gain": torch.ones(groups),
    }
    leaves = {name: values.requires_grad_() for name, values in leaves.items()}
    output = fake_quantize_weight(weight, Recipe(**leaves), grid)
    gradients = torch.autograd.grad((output * seed.float()).sum(), list(leaves.values()))
    expected = {n: torch.zeros_like(v).double() for n, v in leaves.items()}
    step = 1e-4
    start = {name: values.detach().double() for name, values in leaves.items()}
    held = _held(weight.double(), start, grid)
    for name in ("rows", "gain", "upper", "lower"):
        for index in torch.cartesian_prod(*(torch.arange(n) for n in start[name].shape)).view(
            -1, start[name].dim()
        ):
            sides = []
            for sign in (1, -1):
                moved = {k: v.clone() for k, v in start.items()}
                moved[name][tuple(index)] += sign * step
                sides.append((_value(weight.double(), moved, grid, held) * seed).sum())
            expected[name][tuple(index)] = (sides[0] - sides[1]) / (2 * step)
        found = gradients[list(leaves).index(name)].double()
        assert torch.allclose(found, expected[name], rtol=2e-3, atol=2e-3), name


def _scaled(weight, leaves):
    return weight * leaves["rows"][:, None] * leaves["columns"]


def _scales(grouped, leaves, grid):
    low = grouped.amin(-1).clamp(max=0) * leaves["lower"]
    high = grouped.amax(-1).clamp(min=0) * leaves["upper"]
    return grid.scales(low[..., None], high[..., None])


def _held(weight, leaves, grid):
    """Levels, mask and ratios at the start, which straight-through gradients hold still."""
    grouped = grid.grouped(_scaled(weight, leaves))
    scales = _scales(grouped, leaves, grid)
    codes = grid.encode_(grouped.clone(), scales)
    levels = grid.levels_(codes, scales.zero_point)
    ratios = grouped / scales.scale
    return levels, grid.unclipped(ratios, scales.zero_point), ratios


def _value(weight, leaves, grid, held):
    levels, mask, ratios = held
    grouped = grid.grouped(_scaled(weight, leaves))
    scales = _scales(grouped, leaves, grid)
    moved = levels + mask * (grouped / scales.scale - ratios)
    return (scales.scale * moved * leaves["gain"][..., None]).view(weight.shape)


@KINDS
def test_activations_lie_on_it_too(kind, make_grid):
    grid = make_grid(kind, 4, True, None)
    values = random(5, COLUMNS).requires_grad_()
    output = fake_quantize_tokens(values, grid)
    output.sum().backward()
    assert torch.isfinite(values.grad).all() and values.grad.abs().max() > 0
    extremes = group_extremes(values.detach(), grid)
    scales = grid.scales(extremes.low.clamp(max=0), extremes.high.clamp(min=0))
    expected = grid.decode_(grid.encode_(values.detach().clone(), scales), scales)
    assert torch.equal(output, expected)


def test_a_run_on_a_grid_of_another_package(installed, make_model, token_ids, tmp_path):
    installed(PAGE)
    settings = {"calibration": token_ids(3, 16), "epochs": 2, "precision": "float32"}
    run = quantize(
        make_model("llama"),
        "W3A16g16-squares",
        output_dir=str(tmp_path / "run"),
        save_dir=str(tmp_path / "saved"),
        format="dequantized",
        **settings,
    )
    assert all(record.final_loss <= record.initial_loss for record in run.records)
    assert (
        run.config.scheme == "W3A16g16-squares" and "squares grid" in run.config.schemes.describe()
    )
    with pytest.raises(
        LRQuantError, match=r"holds no 'squares' grids; use one of int; --format dequantized"
    ):
        quantize(
            make_model("llama"),
            "W3A16g16-squares",
            output_dir=str(tmp_path / "other"),
            save_dir=str(tmp_path / "packed"),
            **settings,
        )


def test_a_grid_that_nobody_declares_is_refused(make_model, token_ids, tmp_path):
    with pytest.raises(LRQuantError, match="grid 'cubes': use one of int"):
        quantize(
            make_model("llama"),
            "W4A16-cubes",
            calibration=token_ids(1, 16),
            output_dir=str(tmp_path),
        )


def test_a_wrong_scale_is_seen():
    """Negative control of the nearest value."""
    grid = grid_of("int")(4, None, True)
    values = torch.linspace(-1, 1, 99)[None]
    wrong = Scales(torch.tensor([[0.3]]), torch.zeros(1, 1))
    right = grid.scales(torch.tensor([[-1.0]]), torch.tensor([[1.0]]))
    errors = [
        (grid.decode_(grid.encode_(values.clone(), scales), scales) - values).abs().max()
        for scales in (right, wrong)
    ]
    assert errors[1] > 1.5 * errors[0]
