"""Weights on a grid against plain autograd, torch's own quantizer and compressed-tensors.

Both paths, fused and by autograd, are held against the equations written anew in conftest.py.
"""

from __future__ import annotations

import pytest
import torch

from lrquant.numerics import chunks
from lrquant.numerics.grids.grid import SMALLEST_SCALE, Grid
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
    gradients = torch.autograd.grad(total, list(inputs.values()))
    return {"value": output.detach(), **dict(zip(inputs, gradients, strict=True))}


@PATHS
@SYMMETRY
@BITS
@GROUPS
def test_weight_matches_autograd(path, bits, group_size, symmetric, expected_weight, assert_near):
    weight, grid = normal(OUT, IN), IntegerGrid(bits, group_size, symmetric)
    inputs = leaves(weight, grid)
    found = values_and_gradients(path, weight, Recipe(**inputs), grid, inputs)
    expected = values_and_gradients(expected_weight, weight, Recipe(**inputs), grid, inputs)
    for name, theirs in expected.items():
        assert_near(found[name], theirs, name)
        assert theirs.abs().max() > 0, f"{name}: this case shows nothing"


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
@BITS
def test_special_rows_have_codes_in_range_and_small_errors(special, bits, symmetric):
    kind, row = special[0], special[1][None]
    grid = IntegerGrid(bits, 16, symmetric)
    quantized = quantize_weight(row, AS_IT_IS, grid)
    codes, scale, zero_point = quantized
    code_min, code_max = grid.code_range
    assert codes.min() >= code_min and codes.max() <= code_max
    assert torch.equal(codes, codes.round())
    assert zero_point.min() >= code_min and zero_point.max() <= code_max
    assert torch.equal(zero_point, zero_point.round())
    assert scale.min() >= SMALLEST_SCALE and torch.isfinite(scale).all()
    values = dequantize_weight(quantized, grid)
    # Half a step, and half more where the rounded zero point moves the grid off the range's end.
    error = (values - row).abs().view(1, -1, 16) / scale[..., None]
    assert error.max() <= 1.0001
    if kind == "zero":
        assert torch.equal(values, row)


@SYMMETRY
def test_clipping_strengths_shrink_the_grid(symmetric):
    weight, grid = normal(OUT, IN), IntegerGrid(4, None, symmetric)
    full = quantize_weight(weight, AS_IT_IS, grid).scale
    half = torch.full((OUT, 1), 0.5)
    clipped = quantize_weight(weight, Recipe(upper=half, lower=half), grid).scale
    torch.testing.assert_close(clipped, full / 2)


@PATHS
@SYMMETRY
@pytest.mark.parametrize("name", NAMES)
def test_each_input_may_be_the_only_one(path, name, symmetric, expected_weight, assert_near):
    """What is left out is as a factor of one."""
    weight, grid = normal(OUT, IN), IntegerGrid(3, 16, symmetric)
    every = leaves(weight, grid)
    alone = {name: every[name]}
    neutral = {n: v if n == name else torch.ones_like(v) for n, v in every.items()}
    found = values_and_gradients(path, weight, Recipe(**alone), grid, alone)
    expected = values_and_gradients(expected_weight, weight, Recipe(**neutral), grid, alone)
    assert_near(found["value"], expected["value"], "value")
    assert_near(found[name], expected[name], name)


@PATHS
@SYMMETRY
@BITS
@GROUPS
def test_a_gain_of_the_scale_matches_autograd(
    path, bits, group_size, symmetric, expected_weight, assert_near
):
    """Value, gradient of the gain, and what the gain makes of every other gradient."""
    weight, grid = normal(OUT, IN), IntegerGrid(bits, group_size, symmetric)
    plain = leaves(weight, grid)
    gain = uniform(0.5, 2, *plain["upper"].shape, seed=5).requires_grad_()
    inputs = {**plain, "gain": gain}
    found = values_and_gradients(path, weight, Recipe(**inputs), grid, inputs)
    quantized = quantize_weight(weight, Recipe(**inputs), grid)
    assert torch.equal(found["value"], dequantize_weight(quantized, grid))
    assert torch.equal(quantized.codes, quantize_weight(weight, Recipe(**plain), grid).codes)
    expected = values_and_gradients(expected_weight, weight, Recipe(**inputs), grid, inputs)
    for name, theirs in expected.items():
        assert_near(found[name], theirs, name)


@PATHS
@SYMMETRY
@BITS
def test_an_offset_before_rounding_matches_autograd(
    path, bits, symmetric, expected_weight, assert_near
):
    """In units of the scale; alone, and with all else that a weight goes through."""
    weight, grid = normal(OUT, IN), IntegerGrid(bits, 16, symmetric)
    offset = uniform(-0.5, 0.5, OUT, IN, seed=6).requires_grad_()
    every = leaves(weight, grid)
    gain = uniform(0.5, 2, *every["upper"].shape, seed=5).requires_grad_()
    for inputs in ({"offset": offset}, {**every, "gain": gain, "offset": offset}):
        found = values_and_gradients(path, weight, Recipe(**inputs), grid, inputs)
        quantized = quantize_weight(weight, Recipe(**inputs), grid)
        assert torch.equal(found["value"], dequantize_weight(quantized, grid))
        expected = values_and_gradients(expected_weight, weight, Recipe(**inputs), grid, inputs)
        for name, theirs in expected.items():
            assert_near(found[name], theirs, name)
            assert theirs.abs().max() > 0, f"{name}: this case shows nothing"
        without = quantize_weight(weight, Recipe(**{**inputs, "offset": None}), grid)
        assert not torch.equal(without.codes, quantized.codes)


@PATHS
@SYMMETRY
@pytest.mark.parametrize("rank", [1, 3])
def test_a_dense_factor_matches_autograd(path, rank, symmetric, expected_weight, assert_near):
    """On the de-quantised weight; it changes no code."""
    weight, grid = normal(OUT, IN), IntegerGrid(3, 16, symmetric)
    plain = leaves(weight, grid)
    first = uniform(0.5, 2, OUT, rank, seed=5).requires_grad_()
    second = uniform(0.5, 2, rank, IN, seed=6).requires_grad_()
    inputs = {**plain, "first": first, "second": second}
    recipe = Recipe(**plain, dense=(first, second))
    found = values_and_gradients(path, weight, recipe, grid, inputs)
    expected = values_and_gradients(expected_weight, weight, recipe, grid, inputs)
    for name, theirs in expected.items():
        assert_near(found[name], theirs, name)
    with_factor, without = (quantize_weight(weight, r, grid) for r in (recipe, Recipe(**plain)))
    assert all(torch.equal(a, b) for a, b in zip(with_factor, without, strict=True))


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
    with torch.no_grad():
        recipe = Recipe(**leaves(weight, grid))
        quantized = quantize_weight(weight, recipe, grid)
        fake = path(weight, recipe, grid)
    assert torch.equal(quantized.scale, quantized.scale.to(scale_dtype).float())
    decoded = dequantize_weight(quantized, grid)
    assert torch.equal(fake.view(torch.int32), decoded.view(torch.int32))


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
    monkeypatch.setattr(chunks, "_CHUNK_ELEMENTS", 500)
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
        monkeypatch.setattr(chunks, "_CHUNK_ELEMENTS", chunk)
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


def agrees_with_torch(values, weight, scale, zero_point, grid, far_from_ties) -> bool:
    """torch.fake_quantize_per_channel_affine on this grid gives these values."""
    theirs = torch.fake_quantize_per_channel_affine(
        weight, scale[:, 0], zero_point[:, 0].to(torch.int32), 0, *grid.code_range
    )
    sure = far_from_ties(weight / scale)
    assert sure.float().mean() > 0.9
    return torch.allclose(values[sure], theirs[sure], rtol=1e-5, atol=1e-7)


def clipped_weight(grid: Grid) -> tuple[torch.Tensor, Quantized]:
    """A weight of which some values are clipped; its codes, scale and zero point."""
    weight, strength = normal(OUT, IN), torch.full((OUT, 1), 0.8)
    return weight, quantize_weight(weight, Recipe(upper=strength, lower=strength), grid)


@SYMMETRY
@BITS
def test_torch_agrees_on_every_value(bits, symmetric, far_from_ties):
    grid = IntegerGrid(bits, None, symmetric)
    weight, quantized = clipped_weight(grid)
    values = dequantize_weight(quantized, grid)
    _, scale, zero_point = quantized
    assert agrees_with_torch(values, weight, scale, zero_point, grid, far_from_ties)


@SYMMETRY
@BITS
def test_torch_sees_a_wrong_grid(bits, symmetric, far_from_ties):
    """Negative controls of the comparison above."""
    grid = IntegerGrid(bits, None, symmetric)
    weight, quantized = clipped_weight(grid)
    right = dequantize_weight(quantized, grid)
    codes, scale, zero_point = quantized
    odd = codes.clone()
    odd[3, 5] += 1
    wrong = {
        "decoded with another zero point": Quantized(codes, scale, zero_point + 1),
        "decoded with another scale": Quantized(codes, 1.01 * scale, zero_point),
        "one code": Quantized(odd, scale, zero_point),
    }

    def agrees(values, scale, zero_point) -> bool:
        return agrees_with_torch(values, weight, scale, zero_point, grid, far_from_ties)

    for what, other in wrong.items():
        assert not agrees(dequantize_weight(other, grid), scale, zero_point), what
    away = torch.where(zero_point > 0, zero_point - 1, zero_point + 1)
    assert not agrees(right, scale, away)
    assert not agrees(right, 1.01 * scale, zero_point)


@SYMMETRY
@BITS
@GROUPS
def test_compressed_tensors_makes_the_same_grid_and_codes(
    bits, group_size, symmetric, far_from_ties
):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    strategy = "channel" if group_size is None else "group"
    arguments = quantization.QuantizationArgs(
        num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=group_size
    )
    weight, grid = normal(OUT, IN), IntegerGrid(bits, group_size, symmetric)
    quantized = quantize_weight(weight, AS_IT_IS, grid)
    codes, scale, zero_point = quantized
    # Their codes are always signed: code and zero point both move by 2^(b-1).
    offset = 0 if symmetric else 2 ** (bits - 1)
    groups = grid.grouped(weight)
    their_scale, their_zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
    torch.testing.assert_close(scale, their_scale, rtol=3e-7, atol=0)
    assert torch.equal(zero_point - offset, their_zero_point.float())

    their_codes = quantize(weight, scale, zero_point - offset, arguments)
    sure = far_from_ties(groups / scale[..., None]).view_as(weight)
    assert torch.equal((codes - offset)[sure], their_codes[sure])
    decoded = dequantize(codes - offset, scale, zero_point - offset, arguments)
    values = dequantize_weight(quantized, grid)
    torch.testing.assert_close(values, decoded, rtol=1e-6, atol=0)
    shifted = dequantize(codes - offset, scale, zero_point - offset + 1, arguments)
    assert not torch.allclose(values, shifted)


@pytest.mark.parametrize(
    "bits, symmetric, expected",
    [
        *((2, False, (0, 3)), (4, False, (0, 15)), (8, False, (0, 255))),
        *((2, True, (-2, 1)), (4, True, (-8, 7)), (8, True, (-128, 127))),
    ],
)
def test_code_range(bits, symmetric, expected):
    assert IntegerGrid(bits, None, symmetric).code_range == expected


def test_a_grid_by_hand():
    low, high = torch.tensor([-1.0]), torch.tensor([2.0])
    scales = IntegerGrid(2).scales(low, high)
    assert (scales.scale.item(), scales.zero_point.item()) == (1.0, 1.0)
    scales = IntegerGrid(4, symmetric=True).scales(low, high)
    assert scales.scale.item() == pytest.approx(4 / 15) and scales.zero_point.item() == 0
