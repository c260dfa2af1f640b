"""The integer grid by hand, against torch's own quantizer and compressed-tensors."""

from __future__ import annotations

import pytest
import torch

from lrquant.numerics.grids.grid import SMALLEST_SCALE, Grid, quotient, rounded_quotient
from lrquant.numerics.grids.integer import IntegerGrid
from lrquant.numerics.recipe import Recipe
from lrquant.numerics.weights import Quantized, dequantize_weight, quantize_weight

SYMMETRY = pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
BITS = pytest.mark.parametrize("bits", range(2, 9))
GROUPS = pytest.mark.parametrize("group_size", [None, 16])
OUT, IN = 24, 64
AS_IT_IS = Recipe()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


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


@BITS
@pytest.mark.parametrize("half", [1, 2])
def test_scales_are_rounded_alike_on_every_device(bits, half):
    """By the reciprocal in float32, as CUDA divides by a number, some would be another value."""
    values, divisor = normal(1 << 16).abs(), (2**bits - 1) / half
    expected = (values.double() / divisor).float()
    assert torch.equal(quotient(values, divisor), expected)
    assert torch.equal(rounded_quotient(values, divisor), expected)
    assert (values * (1 / torch.tensor(divisor)) != expected).any()


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
