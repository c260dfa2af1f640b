"""The affine quantizer against plain autograd, torch's own quantizer and compressed-tensors."""

from __future__ import annotations

import pytest
import torch
from lrquant.numerics.affine import (
    SMALLEST_SCALE,
    affine_grid,
    code_range,
    dequantize_weight,
    effective_weight,
    fake_quantize_tokens,
    fake_quantize_weight,
    group_extremes,
    quantize_weight,
)

from lrquant.numerics import affine

SYMMETRY = pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
BITS = pytest.mark.parametrize("bits", range(2, 9))
GROUPS = pytest.mark.parametrize("group_size", [64, 16])
OUT, IN = 24, 64


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def uniform(low: float, high: float, *shape: int, seed: int = 0) -> torch.Tensor:
    values = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return low + (high - low) * values


def special_rows() -> dict[str, torch.Tensor]:
    mixed = normal(IN, seed=5)
    return {
        "mixed": mixed,
        "positive": mixed.abs() + 1,
        "negative": -mixed.abs() - 1,
        "constant positive": torch.full((IN,), 0.7),
        "constant negative": torch.full((IN,), -0.7),
        "zero": torch.zeros(IN),
        "one value": torch.zeros(IN).index_fill(0, torch.tensor(3), 2.5),
        "below the smallest scale": mixed * 1e-7,
        "huge": mixed * 1e20,
    }


def rounded(values: torch.Tensor) -> torch.Tensor:
    """round(), with the gradient of the identity."""
    return values + (torch.round(values) - values).detach()


def reference_round_trip(groups, upper, lower, bits, symmetric):
    """algorithm.md, section 1, on (..., group_size) by autograd alone, in float32.

    The largest value of a symmetric group lies exactly between two codes, so a scale in the last
    place apart would choose another one: its order of operations is that of the tested code.
    """
    zero = torch.zeros(())
    high = torch.maximum(groups.amax(-1, keepdim=True), zero) * upper
    low = torch.minimum(groups.amin(-1, keepdim=True), zero) * lower
    if symmetric:
        code_min, code_max = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        scale = torch.maximum(high, -low) / ((2**bits - 1) / 2)
    else:
        code_min, code_max = 0, 2**bits - 1
        scale = (high - low) / code_max
    scale = scale.clamp(min=1e-5)
    if symmetric:
        zero_point = torch.zeros_like(scale)
    else:
        zero_point = torch.round(-low / scale).clamp(0, code_max).detach()
    codes = (rounded(groups / scale) + zero_point).clamp(code_min, code_max)
    return scale * (codes - zero_point)


def reference_weight(weight, row, column, upper, lower, bits, group_size, symmetric):
    groups = (weight * row[:, None] * column).view(len(weight), -1, group_size)
    upper, lower = (values[..., None] for values in (upper, lower))
    return reference_round_trip(groups, upper, lower, bits, symmetric).view_as(weight)


def weight_inputs(weight: torch.Tensor, group_size: int) -> list[torch.Tensor]:
    """Row and column factor, both clipping strengths: leaves with gradients."""
    rows, columns = weight.shape
    groups = columns // group_size
    inputs = [
        uniform(0.5, 2, rows, seed=1),
        uniform(0.5, 2, columns, seed=2),
        uniform(0.6, 1, rows, groups, seed=3),
        uniform(0.6, 1, rows, groups, seed=4),
    ]
    return [values.requires_grad_() for values in inputs]


def values_and_gradients(function, weight, inputs, *settings) -> list[torch.Tensor]:
    output = function(weight, *inputs, *settings)
    gradients = torch.autograd.grad((output * normal(*output.shape, seed=9)).sum(), inputs)
    return [output.detach(), *gradients]


def assert_near(found: torch.Tensor, expected: torch.Tensor, what: str, size: float = 1) -> None:
    """Equal but for the rounding of sums over values of about `size`."""
    assert found.shape == expected.shape and torch.isfinite(expected).all()
    error = float((found - expected).abs().max())
    assert error <= 5e-6 * float(expected.abs().max()) + 1e-6 * size, f"{what}: off by {error}"


NAMES = ["value", "row factor", "column factor", "upper", "lower"]


@SYMMETRY
@BITS
@GROUPS
def test_weight_matches_autograd(bits, group_size, symmetric):
    weight = normal(OUT, IN)
    inputs = weight_inputs(weight, group_size)
    settings = (bits, group_size, symmetric)
    found = values_and_gradients(fake_quantize_weight, weight, inputs, *settings)
    expected = values_and_gradients(reference_weight, weight, inputs, *settings)
    for name, ours, theirs in zip(NAMES, found, expected, strict=True):
        assert_near(ours, theirs, name)
        assert theirs.abs().max() > 0, f"{name}: this case shows nothing"


@SYMMETRY
@pytest.mark.parametrize("kind", special_rows())
def test_special_rows_match_autograd(kind, symmetric):
    weight = special_rows()[kind][None]
    inputs = weight_inputs(weight, 16)
    found = values_and_gradients(fake_quantize_weight, weight, inputs, 4, 16, symmetric)
    expected = values_and_gradients(reference_weight, weight, inputs, 4, 16, symmetric)
    for name, ours, theirs in zip(NAMES, found, expected, strict=True):
        assert_near(ours, theirs, name, float(weight.abs().max()))


@SYMMETRY
@BITS
@pytest.mark.parametrize("kind", special_rows())
def test_special_rows_have_codes_in_range_and_small_errors(kind, bits, symmetric):
    row = special_rows()[kind][None]
    codes, scale, zero_point = quantize_weight(row, None, None, None, None, bits, 16, symmetric)
    code_min, code_max = code_range(bits, symmetric)
    assert codes.min() >= code_min and codes.max() <= code_max
    assert torch.equal(codes, codes.round())
    assert zero_point.min() >= code_min and zero_point.max() <= code_max
    assert torch.equal(zero_point, zero_point.round())
    assert scale.min() >= SMALLEST_SCALE and torch.isfinite(scale).all()
    values = dequantize_weight(codes, scale, zero_point)
    # Half a step, and half more where the rounded zero point moves the grid off the range's end.
    error = (values - row).abs().view(1, -1, 16) / scale[..., None]
    assert error.max() <= 1.0001
    if kind == "zero":
        assert torch.equal(values, row)


@SYMMETRY
def test_clipping_strengths_shrink_the_grid(symmetric):
    weight = normal(OUT, IN)
    full = quantize_weight(weight, None, None, None, None, 4, IN, symmetric)[1]
    half = torch.full((OUT, 1), 0.5)
    clipped = quantize_weight(weight, None, None, half, half, 4, IN, symmetric)[1]
    torch.testing.assert_close(clipped, full / 2)


@SYMMETRY
@pytest.mark.parametrize("given", NAMES[1:])
def test_each_input_may_be_the_only_one(given, symmetric):
    weight = normal(OUT, IN)
    every = weight_inputs(weight, 16)
    position = NAMES.index(given) - 1
    alone = [v if i == position else None for i, v in enumerate(every)]
    neutral = [v if i == position else torch.ones_like(v) for i, v in enumerate(every)]
    gradient_of = every[position]
    seed = normal(OUT, IN, seed=9)
    results = []
    for function, inputs in ((fake_quantize_weight, alone), (reference_weight, neutral)):
        output = function(weight, *inputs, 3, 16, symmetric)
        gradient = torch.autograd.grad((output * seed).sum(), gradient_of)[0]
        results.append((output.detach(), gradient))
    assert_near(results[0][0], results[1][0], "value")
    assert_near(results[0][1], results[1][1], given)


@SYMMETRY
@BITS
@pytest.mark.parametrize("group_size", [IN, 16])
def test_a_gain_of_the_scale_matches_autograd(bits, group_size, symmetric):
    """Value, gradient of the gain, and what the gain makes of every other gradient."""
    weight = normal(OUT, IN)
    results = []
    for ours in (True, False):
        inputs = weight_inputs(weight, group_size)
        gain = uniform(0.5, 2, OUT, IN // group_size, seed=5).requires_grad_()
        settings = bits, group_size, symmetric
        if ours:
            output = fake_quantize_weight(weight, *inputs, *settings, gain=gain)
            codes = quantize_weight(weight, *inputs, *settings, gain=gain)
            assert torch.equal(output, dequantize_weight(*codes))
            assert torch.equal(codes[0], quantize_weight(weight, *inputs, *settings)[0])
        else:
            spread = gain.repeat_interleave(group_size, 1)
            output = reference_weight(weight, *inputs, *settings) * spread
        leaves = [*inputs, gain]
        gradients = torch.autograd.grad((output * normal(OUT, IN, seed=9)).sum(), leaves)
        results.append([output.detach(), *gradients])
    for name, found, expected in zip([*NAMES, "gain"], *results, strict=True):
        assert_near(found, expected, name)


def test_no_gradient_reaches_the_stored_weight():
    weight = normal(OUT, IN).requires_grad_()
    factor = torch.ones(OUT, requires_grad=True)
    fake_quantize_weight(weight, factor, None, None, None, 4, IN).sum().backward()
    assert weight.grad is None and factor.grad is not None


def test_inputs_are_not_changed():
    weight = normal(OUT, IN)
    inputs = weight_inputs(weight, 16)
    before = [value.detach().clone() for value in (weight, *inputs)]
    fake_quantize_weight(weight, *inputs, 4, 16).square().sum().backward()
    fake_quantize_tokens(weight, 4)
    after = [weight, *inputs]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@SYMMETRY
@BITS
@GROUPS
def test_fake_quantization_equals_codes_decoded_bit_for_bit(bits, group_size, symmetric):
    weight = normal(OUT, IN)
    with torch.no_grad():
        row, column, upper, lower = weight_inputs(weight, group_size)
        settings = (weight, row, column, upper, lower)
        codes, scale, zero_point = quantize_weight(*settings, bits, group_size, symmetric)
        fake = fake_quantize_weight(*settings, bits, group_size, symmetric)
    decoded = dequantize_weight(codes, scale, zero_point)
    assert torch.equal(fake.view(torch.int32), decoded.view(torch.int32))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_arithmetic_is_float32_whatever_the_dtypes(stored, dtype):
    weight = normal(OUT, IN).to(stored)
    plain = [None] * 4
    found = fake_quantize_weight(weight, *plain, 4, 16, dtype=dtype)
    expected = fake_quantize_weight(weight.float(), *plain, 4, 16).to(dtype)
    assert found.dtype == dtype and torch.equal(found, expected)
    tokens = fake_quantize_tokens(weight, 4, dtype=dtype)
    assert tokens.dtype == dtype
    assert torch.equal(tokens, fake_quantize_tokens(weight.float(), 4).to(dtype))


@SYMMETRY
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_known_extremes_change_nothing(scaled, stored, symmetric, monkeypatch):
    monkeypatch.setattr(affine, "_CHUNK_ELEMENTS", 500)
    weight = normal(OUT, IN).to(stored)
    row, column, upper, lower = weight_inputs(weight, 16)
    inputs = [row, column] if scaled else [None, None]
    extremes = group_extremes(effective_weight(weight, *inputs), 16)
    leaves = [values for values in (*inputs, upper, lower) if values is not None]
    results = []
    for known in (None, extremes, (extremes[0] * 0.7, extremes[1] * 0.7)):
        settings = (*inputs, upper, lower, 4, 16, symmetric, torch.float32, known)
        output = fake_quantize_weight(weight, *settings)
        gradients = torch.autograd.grad((output * normal(OUT, IN, seed=9)).sum(), leaves)
        codes = quantize_weight(weight, *inputs, upper, lower, 4, 16, symmetric, known)
        results.append([output, *gradients, *codes])
    searched, given, wrong = results
    assert all(torch.equal(a, b) for a, b in zip(searched, given, strict=True))
    assert not torch.equal(searched[0], wrong[0])  # negative control: they are used


@SYMMETRY
@pytest.mark.parametrize("elements", [1, 100, 128, 1000])
def test_results_do_not_depend_on_the_chunk_size(elements, symmetric, monkeypatch):
    weight = normal(OUT, IN)
    inputs = weight_inputs(weight, 16)
    results = []
    for chunk in (1 << 17, elements):
        monkeypatch.setattr(affine, "_CHUNK_ELEMENTS", chunk)
        tokens = normal(2, 12, IN).requires_grad_()
        output = fake_quantize_tokens(tokens, 4, symmetric)
        (gradient,) = torch.autograd.grad((output * normal(*output.shape, seed=9)).sum(), tokens)
        weights = values_and_gradients(fake_quantize_weight, weight, inputs, 4, 16, symmetric)
        results.append([*weights, output, gradient])
    for name, whole, parts in zip([*NAMES, "tokens", "token gradient"], *results, strict=True):
        if name == "column factor":  # the only sum over rows
            assert_near(parts, whole, name)
        else:
            assert torch.equal(parts, whole), name


def test_a_matrix_of_several_chunks_matches_autograd():
    weight = normal(300, 512)
    assert len(affine.row_chunks(weight)) > 1
    inputs = weight_inputs(weight, 128)
    found = values_and_gradients(fake_quantize_weight, weight, inputs, 4, 128, False)
    expected = values_and_gradients(reference_weight, weight, inputs, 4, 128, False)
    for name, ours, theirs in zip(NAMES, found, expected, strict=True):
        assert_near(ours, theirs, name)


@pytest.mark.parametrize("rows, columns", [(1, 1), (7, 3), (5, 1 << 18), (300, 512), (0, 8)])
def test_chunks_cover_every_row_once(rows, columns):
    chunks = affine.row_chunks(torch.empty(rows, columns))
    assert [row for chunk in chunks for row in range(rows)[chunk]] == list(range(rows))


def reference_tokens(values, bits, symmetric):
    return reference_round_trip(values, 1.0, 1.0, bits, symmetric)


@SYMMETRY
@BITS
@pytest.mark.parametrize("shape", [(5, 32), (2, 5, 32), (2, 4, 5, 8), (3, 1)])
def test_tokens_match_autograd(shape, bits, symmetric):
    results = []
    for function in (fake_quantize_tokens, reference_tokens):
        values = (normal(*shape) + 0.3).requires_grad_()
        output = function(values, bits, symmetric)
        (gradient,) = torch.autograd.grad((output * normal(*shape, seed=9)).sum(), values)
        results.append((output.detach(), gradient))
    (output, gradient), (expected, expected_gradient) = results
    assert_near(output, expected, "value")
    assert_near(gradient, expected_gradient, "gradient")


@SYMMETRY
@pytest.mark.parametrize("kind", special_rows())
def test_special_tokens_match_autograd(kind, symmetric):
    results = []
    for function in (fake_quantize_tokens, reference_tokens):
        values = special_rows()[kind][None].requires_grad_()
        output = function(values, 4, symmetric)
        seed = normal(IN, seed=9)
        (gradient,) = torch.autograd.grad((output * seed).sum(), values)
        results.append((output.detach(), gradient))
    (output, gradient), (expected, expected_gradient) = results
    assert_near(output, expected, "value", 0)
    if kind == "one value":  # a minimum of exactly 0: the range does not move with it
        where = torch.arange(IN) == 3
        gradient, expected_gradient = gradient[:, where], expected_gradient[:, where]
    assert_near(gradient, expected_gradient, "gradient")


def test_tokens_that_are_not_contiguous():
    values = normal(2, 4, 5, 8).transpose(1, 2)
    assert torch.equal(fake_quantize_tokens(values, 4), fake_quantize_tokens(values.clone(), 4))


@SYMMETRY
@BITS
def test_one_token_does_not_touch_another(bits, symmetric):
    values = normal(6, 16)
    alone = torch.cat([fake_quantize_tokens(row[None], bits, symmetric) for row in values])
    assert torch.equal(fake_quantize_tokens(values, bits, symmetric), alone)


def away_from_ties(ratio: torch.Tensor) -> torch.Tensor:
    """Where one unit in the last place of a scale can't change the rounding."""
    return ((ratio - torch.floor(ratio)) - 0.5).abs() > 1e-3


def agrees_with_torch(values, weight, scale, zero_point, bits, symmetric) -> bool:
    """torch.fake_quantize_per_channel_affine on this grid gives these values."""
    theirs = torch.fake_quantize_per_channel_affine(
        weight, scale[:, 0], zero_point[:, 0].to(torch.int32), 0, *code_range(bits, symmetric)
    )
    sure = away_from_ties(weight / scale)
    assert sure.float().mean() > 0.9
    return torch.allclose(values[sure], theirs[sure], rtol=1e-5, atol=1e-7)


def clipped_weight(bits, symmetric):
    """A weight of which some values are clipped; its codes, scale and zero point."""
    weight, strength = normal(OUT, IN), torch.full((OUT, 1), 0.8)
    return weight, *quantize_weight(weight, None, None, strength, strength, bits, IN, symmetric)


@SYMMETRY
@BITS
def test_torch_agrees_on_every_value(bits, symmetric):
    weight, codes, scale, zero_point = clipped_weight(bits, symmetric)
    values = dequantize_weight(codes, scale, zero_point)
    assert agrees_with_torch(values, weight, scale, zero_point, bits, symmetric)


@SYMMETRY
@BITS
def test_torch_sees_a_wrong_grid(bits, symmetric):
    """Negative controls of the comparison above."""
    weight, codes, scale, zero_point = clipped_weight(bits, symmetric)
    right = dequantize_weight(codes, scale, zero_point)
    odd = codes.clone()
    odd[3, 5] += 1
    wrong = {
        "decoded with another zero point": dequantize_weight(codes, scale, zero_point + 1),
        "decoded with another scale": dequantize_weight(codes, 1.01 * scale, zero_point),
        "one code": dequantize_weight(odd, scale, zero_point),
    }
    for what, values in wrong.items():
        assert not agrees_with_torch(values, weight, scale, zero_point, bits, symmetric), what
    away = torch.where(zero_point > 0, zero_point - 1, zero_point + 1)
    assert not agrees_with_torch(right, weight, scale, away, bits, symmetric)
    assert not agrees_with_torch(right, weight, 1.01 * scale, zero_point, bits, symmetric)


def compressed_tensors_arguments(bits, symmetric, group_size=None):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    return quantization.QuantizationArgs(
        num_bits=bits,
        symmetric=symmetric,
        strategy="channel" if group_size is None else "group",
        group_size=group_size,
    )


@SYMMETRY
@BITS
@pytest.mark.parametrize("group_size", [None, 16])
def test_compressed_tensors_makes_the_same_grid_and_codes(bits, group_size, symmetric):
    arguments = compressed_tensors_arguments(bits, symmetric, group_size)
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    weight = normal(OUT, IN)
    codes, scale, zero_point = quantize_weight(
        weight, None, None, None, None, bits, group_size or IN, symmetric
    )
    # Their codes are always signed: code and zero point both move by 2^(b-1).
    offset = 0 if symmetric else 2 ** (bits - 1)
    groups = weight.view(OUT, -1, group_size or IN)
    their_scale, their_zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
    torch.testing.assert_close(scale, their_scale, rtol=3e-7, atol=0)
    assert torch.equal(zero_point - offset, their_zero_point.float())

    their_codes = quantize(weight, scale, zero_point - offset, arguments)
    sure = away_from_ties(groups / scale[..., None]).view_as(weight)
    assert torch.equal((codes - offset)[sure], their_codes[sure])
    decoded = dequantize(codes - offset, scale, zero_point - offset, arguments)
    torch.testing.assert_close(
        dequantize_weight(codes, scale, zero_point), decoded, rtol=1e-6, atol=0
    )
    shifted = dequantize(codes - offset, scale, zero_point - offset + 1, arguments)
    assert not torch.allclose(dequantize_weight(codes, scale, zero_point), shifted)


@SYMMETRY
@BITS
def test_compressed_tensors_quantises_tokens_the_same(bits, symmetric):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    arguments = quantization.QuantizationArgs(
        num_bits=bits, symmetric=symmetric, strategy="token", dynamic=True
    )
    values = normal(2, 6, 32)
    scale, zero_point = compute_dynamic_scales_and_zp(values, arguments, torch.nn.Module())
    theirs = fake_quantize(values, scale, zero_point, arguments)
    ours = fake_quantize_tokens(values, bits, symmetric)
    sure = away_from_ties(values / scale)
    torch.testing.assert_close(ours[sure], theirs[sure], rtol=1e-5, atol=1e-7)
    if symmetric:  # the largest value is a tie: -7.5 is -8 or -7 by the last bit of the scale
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "bits, symmetric, expected",
    [
        *((2, False, (0, 3)), (4, False, (0, 15)), (8, False, (0, 255))),
        *((2, True, (-2, 1)), (4, True, (-8, 7)), (8, True, (-128, 127))),
    ],
)
def test_code_range(bits, symmetric, expected):
    assert code_range(bits, symmetric) == expected


def test_grid_by_hand():
    low, high = torch.tensor([-1.0]), torch.tensor([2.0])
    grid = affine_grid(low, high, 2, symmetric=False)
    assert (grid.scale.item(), grid.zero_point.item()) == (1.0, 1.0)
    grid = affine_grid(low, high, 4, symmetric=True)
    assert grid.scale.item() == pytest.approx(4 / 15) and grid.zero_point.item() == 0
