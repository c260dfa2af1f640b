"""Weights through a recipe and a grid, against plain autograd.

Both paths, fused and by autograd, are held against the equations written anew in conftest.py.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lrquant.numerics import chunks
from lrquant.numerics.grids.grid import Grid
from lrquant.numerics.grids.integer import IntegerGrid
from lrquant.numerics.recipe import Recipe, scaled_weight
from lrquant.numerics.weights import (
    Extremes,
    Quantized,
    dequantize_weight,
    fake_quantize_weight,
    group_extremes,
    quantize_weight,
    reference_weight,
)

SYMMETRY = pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
BITS = pytest.mark.parametrize("bits", range(2, 9))
GROUPS = pytest.mark.parametrize("group_size", [None, 16])
PATHS = pytest.mark.parametrize(
    "path", [fake_quantize_weight, reference_weight], ids=["fused", "autograd"]
)
OUT, IN = 24, 64
AS_IT_IS = Recipe()
NAMES = ["rows", "columns", "upper", "lower"]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def uniform(low: float, high: float, *shape: int, seed: int = 0) -> torch.Tensor:
    values = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return low + (high - low) * values


def leaves(weight: torch.Tensor, grid: Grid) -> dict[str, torch.Tensor]:
    """Row and column factor, both clipping strengths, with gradients, by their names."""
    rows, columns = weight.shape
    groups = columns // grid.size(columns)
    values = {
        "rows": uniform(0.5, 2, rows, seed=1),
        "columns": uniform(0.5, 2, columns, seed=2),
        "upper": uniform(0.6, 1, rows, groups, seed=3),
        "lower": uniform(0.6, 1, rows, groups, seed=4),
    }
    return {name: value.requires_grad_() for name, value in values.items()}


FIELDS = (*NAMES, "offset", "gain", "dense")
RECIPES = pytest.mark.parametrize(
    "fields",
    [(), *((field,) for field in FIELDS), ("upper", "lower", "gain"), FIELDS],
    ids=lambda fields: " ".join(fields) or "nothing",
)


def recipe_of(fields, weight: torch.Tensor, grid: Grid) -> tuple[Recipe, dict[str, torch.Tensor]]:
    """A recipe with these fields, and all that learns in it by name."""
    every = leaves(weight, grid)
    every["offset"] = uniform(-0.5, 0.5, OUT, IN, seed=6).requires_grad_()
    every["gain"] = uniform(0.5, 2, *every["upper"].shape, seed=5).requires_grad_()
    values = {name: every[name] for name in fields if name != "dense"}
    if "dense" not in fields:
        return Recipe(**values), values
    factors = (
        uniform(0.5, 2, OUT, 3, seed=7).requires_grad_(),
        uniform(0.5, 2, 3, IN, seed=8).requires_grad_(),
    )
    return Recipe(**values, dense=factors), values | dict(zip(("r1", "r2"), factors, strict=True))


@pytest.fixture
def expected_weight(round_trip):
    """The same call as that of both paths, by equations that are not theirs."""

    def expected(weight, recipe: Recipe, grid: Grid) -> torch.Tensor:
        rows = torch.ones(len(weight)) if recipe.rows is None else recipe.rows
        columns = 1.0 if recipe.columns is None else recipe.columns
        groups = (weight * rows[:, None] * columns).view(len(weight), -1, grid.size(len(weight[0])))
        upper, lower = (
            1.0 if strength is None else strength[..., None]
            for strength in (recipe.upper, recipe.lower)
        )
        offset = 0.0 if recipe.offset is None else recipe.offset.view_as(groups)
        values = round_trip(groups, upper, lower, grid, offset)
        values = values if recipe.gain is None else values * recipe.gain[..., None]
        values = values.view_as(weight)
        return values if recipe.dense is None else values * (recipe.dense[0] @ recipe.dense[1])

    return expected


def values_and_gradients(function, weight, recipe: Recipe, grid: Grid, inputs):
    """The value, and the gradient of each of `inputs`, by name."""
    output = function(weight, recipe, grid)
    total = (output * normal(*output.shape, seed=9)).sum()
    gradients = torch.autograd.grad(total, list(inputs.values())) if inputs else ()
    return {"value": output.detach(), **dict(zip(inputs, gradients, strict=True))}


@PATHS
@RECIPES
@SYMMETRY
@BITS
@GROUPS
def test_weight_matches_the_equations(
    path, fields, bits, group_size, symmetric, expected_weight, assert_near
):
    weight, grid = normal(OUT, IN), IntegerGrid(bits, group_size, symmetric)
    recipe, inputs = recipe_of(fields, weight, grid)
    found = values_and_gradients(path, weight, recipe, grid, inputs)
    expected = values_and_gradients(expected_weight, weight, recipe, grid, inputs)
    for name, theirs in expected.items():
        assert_near(found[name], theirs, name)
        assert theirs.abs().max() > 0, f"{name}: this case shows nothing"


@SYMMETRY
@BITS
@GROUPS
def test_shifted_codes_on_both_paths(bits, group_size, symmetric, assert_near):
    """The value is that of the codes moved; gradients of both paths agree, but none is to it."""
    weight, grid = normal(OUT, IN), IntegerGrid(bits, group_size, symmetric)
    recipe, inputs = recipe_of(FIELDS, weight, grid)
    shift = normal(OUT, IN, seed=3).round().clamp(-1, 1).requires_grad_()
    recipe = dataclasses.replace(recipe, shift=shift, dense=None)
    inputs = {name: values for name, values in inputs.items() if name not in ("r1", "r2")}
    plain = quantize_weight(weight, dataclasses.replace(recipe, shift=None).detached(), grid)
    moved = quantize_weight(weight, recipe.detached(), grid)
    assert torch.equal(moved.codes, (plain.codes + shift).clamp(*grid.code_range))
    paths = fake_quantize_weight, reference_weight
    fused, plainly = (values_and_gradients(path, weight, recipe, grid, inputs) for path in paths)
    assert torch.equal(fused["value"], dequantize_weight(moved, grid))
    for name, theirs in plainly.items():
        assert_near(fused[name], theirs, name)


@SYMMETRY
@BITS
@GROUPS
def test_codes_are_those_before_what_follows_the_grid(bits, group_size, symmetric):
    """A gain and a dense factor change no code, and a dense factor no scale; an offset does."""
    weight, grid = normal(OUT, IN), IntegerGrid(bits, group_size, symmetric)

    def quantized(*fields: str) -> Quantized:
        return quantize_weight(weight, recipe_of(fields, weight, grid)[0], grid)

    plain = quantized(*NAMES)
    gain, dense, offset = (quantized(*NAMES, name) for name in ("gain", "dense", "offset"))
    assert torch.equal(gain.codes, plain.codes) and not torch.equal(gain.scale, plain.scale)
    assert all(torch.equal(a, b) for a, b in zip(dense, plain, strict=True))
    assert torch.equal(offset.scale, plain.scale) and not torch.equal(offset.codes, plain.codes)


@PATHS
@SYMMETRY
def test_special_rows_match_autograd(path, special, symmetric, expected_weight, assert_near):
    weight, grid = special[1][None], IntegerGrid(4, 16, symmetric)
    inputs = leaves(weight, grid)
    found = values_and_gradients(path, weight, Recipe(**inputs), grid, inputs)
    expected = values_and_gradients(expected_weight, weight, Recipe(**inputs), grid, inputs)
    for name, theirs in expected.items():
        assert_near(found[name], theirs, name, float(weight.abs().max()))


@SYMMETRY
def test_clipping_strengths_shrink_the_grid(symmetric):
    weight, grid = normal(OUT, IN), IntegerGrid(4, None, symmetric)
    full = quantize_weight(weight, AS_IT_IS, grid).scale
    half = torch.full((OUT, 1), 0.5)
    clipped = quantize_weight(weight, Recipe(upper=half, lower=half), grid).scale
    torch.testing.assert_close(clipped, full / 2)


@RECIPES
@SYMMETRY
@GROUPS
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_path_is_the_one_by_autograd(
    fields, group_size, symmetric, scale_dtype, dtype, assert_near
):
    """The same bits, and gradients to all of a recipe that differ by the rounding of sums."""
    weight, grid = normal(OUT, IN), IntegerGrid(3, group_size, symmetric, scale_dtype)
    recipe, inputs = recipe_of(fields, weight, grid)
    seed = normal(OUT, IN, seed=9)
    results = []
    for path in (fake_quantize_weight, reference_weight):
        output = path(weight, recipe, grid, dtype)
        assert output.dtype == dtype and output.requires_grad == bool(inputs)
        gradients = torch.autograd.grad((output * seed).sum(), inputs.values()) if inputs else ()
        results.append((output.detach(), dict(zip(inputs, gradients, strict=True))))
    (fused, ours), (plain, theirs) = results
    assert torch.equal(fused, plain)
    for name, gradient in theirs.items():
        assert gradient.dtype == torch.float32 and gradient.abs().max() > 0, name
        assert_near(ours[name], gradient, name)


@pytest.mark.parametrize(
    "fields", [*((field,) for field in FIELDS[:-1]), FIELDS[:-1]], ids=" ".join
)
@SYMMETRY
def test_the_rounding_of_a_stored_scale_has_no_gradient(
    fields, symmetric, expected_weight, assert_near
):
    """Gradients are those of the scale before it is stored in bfloat16, in both paths alike."""
    weight, grid = normal(OUT, IN), IntegerGrid(3, 16, symmetric, torch.bfloat16)
    recipe, inputs = recipe_of(fields, weight, grid)
    found = values_and_gradients(reference_weight, weight, recipe, grid, inputs)
    expected = values_and_gradients(expected_weight, weight, recipe, grid, inputs)
    assert not torch.equal(found["value"], expected["value"]), "the scale is not rounded"
    for name in inputs:
        assert_near(found[name], expected[name], name)


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_of_a_recipe_moves_the_weight(field):
    """Negative control: nothing above holds because a path leaves a field out."""
    weight, grid = normal(OUT, IN), IntegerGrid(3, 16)
    recipe, _ = recipe_of((field,), weight, grid)
    for path in (fake_quantize_weight, reference_weight):
        assert not torch.equal(path(weight, recipe, grid), path(weight, AS_IT_IS, grid))


@PATHS
def test_no_gradient_reaches_the_stored_weight(path):
    weight = normal(OUT, IN).requires_grad_()
    factor = torch.ones(OUT, requires_grad=True)
    path(weight, Recipe(rows=factor), IntegerGrid(4)).sum().backward()
    assert weight.grad is None and factor.grad is not None


@PATHS
def test_inputs_are_not_changed(path):
    weight, grid = normal(OUT, IN), IntegerGrid(4, 16)
    inputs = leaves(weight, grid)
    inputs["offset"] = uniform(-0.5, 0.5, OUT, IN, seed=6).requires_grad_()
    before = [value.detach().clone() for value in (weight, *inputs.values())]
    path(weight, Recipe(**inputs), grid).square().sum().backward()
    after = [weight, *inputs.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@PATHS
@SYMMETRY
@BITS
@GROUPS
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_fake_quantization_equals_codes_decoded_bit_for_bit(
    path, bits, group_size, symmetric, scale_dtype
):
    weight, grid = normal(OUT, IN), IntegerGrid(bits, group_size, symmetric, scale_dtype)
    for fields in (NAMES, FIELDS[:-1], FIELDS):
        with torch.no_grad():
            recipe, _ = recipe_of(fields, weight, grid)
            quantized = quantize_weight(weight, recipe, grid)
            fake = path(weight, recipe, grid)
        assert torch.equal(quantized.scale, quantized.scale.to(scale_dtype).float())
        decoded = dequantize_weight(quantized, grid)
        if recipe.dense is not None:
            decoded = decoded * torch.mm(*recipe.dense)
        assert torch.equal(fake.view(torch.int32), decoded.view(torch.int32)), fields


@PATHS
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_arithmetic_is_float32_whatever_the_dtypes(path, stored, dtype):
    weight, grid = normal(OUT, IN).to(stored), IntegerGrid(4, 16)
    found = path(weight, AS_IT_IS, grid, dtype)
    expected = path(weight.float(), AS_IT_IS, grid).to(dtype)
    assert found.dtype == dtype and torch.equal(found, expected)


@SYMMETRY
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_extremes_known_before_change_nothing(scaled, stored, symmetric, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", 500)
    weight, grid = normal(OUT, IN).to(stored), IntegerGrid(4, 16, symmetric)
    inputs = leaves(weight, grid)
    inputs = inputs if scaled else {name: inputs[name] for name in ("upper", "lower")}
    recipe = Recipe(**inputs)
    right = group_extremes(scaled_weight(weight, recipe), grid)
    results = []
    for extremes in (None, right, Extremes(right.low * 0.7, right.high * 0.7)):
        output = fake_quantize_weight(weight, recipe, grid, torch.float32, extremes)
        total = (output * normal(OUT, IN, seed=9)).sum()
        gradients = torch.autograd.grad(total, list(inputs.values()))
        results.append([output, *gradients, *quantize_weight(weight, recipe, grid, extremes)])
    searched, told, wrong = results
    assert all(torch.equal(a, b) for a, b in zip(searched, told, strict=True))
    assert not torch.equal(searched[0], wrong[0])  # negative control: they are used


@SYMMETRY
@pytest.mark.parametrize("elements", [1, 100, 128, 1000])
def test_results_do_not_depend_on_the_chunk_size(elements, symmetric, monkeypatch, assert_near):
    weight, grid = normal(OUT, IN), IntegerGrid(4, 16, symmetric)
    inputs = leaves(weight, grid)
    inputs["offset"] = uniform(-0.5, 0.5, OUT, IN, seed=6).requires_grad_()
    results = []
    for chunk in (1 << 17, elements):
        monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", chunk)
        recipe = Recipe(**inputs)
        results.append(values_and_gradients(fake_quantize_weight, weight, recipe, grid, inputs))
    for name, whole in results[0].items():
        if name == "columns":  # the only sum over rows
            assert_near(results[1][name], whole, name)
        else:
            assert torch.equal(results[1][name], whole), name


def test_a_matrix_of_several_chunks_matches_autograd(expected_weight, assert_near):
    weight, grid = normal(300, 512), IntegerGrid(4, 128)
    assert len(chunks.row_chunks(weight)) > 1
    inputs = leaves(weight, grid)
    recipe = Recipe(**inputs)
    found = values_and_gradients(fake_quantize_weight, weight, recipe, grid, inputs)
    expected = values_and_gradients(expected_weight, weight, recipe, grid, inputs)
    for name, theirs in expected.items():
        assert_near(found[name], theirs, name)


@pytest.mark.parametrize("rows, columns", [(1, 1), (7, 3), (5, 1 << 18), (300, 512), (0, 8)])
def test_chunks_cover_every_row_once(rows, columns):
    parts = chunks.row_chunks(torch.empty(rows, columns))
    assert [row for part in parts for row in range(rows)[part]] == list(range(rows))
