"""Activations on a grid against plain autograd and compressed-tensors."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from lrquant.numerics import chunks
from lrquant.numerics.grids.grid import Grid, Scales
from lrquant.numerics.grids.integer import IntegerGrid
from lrquant.numerics.tokens import fake_quantize_tokens

SYMMETRY = pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
BITS = pytest.mark.parametrize("bits", range(2, 9))


@dataclass(frozen=True)
class PlainGrid(Grid):
    """Integers as another package may write them: a grid without a gradient by hand."""

    kind = "plain"

    @property
    def integers(self) -> IntegerGrid:
        return IntegerGrid(self.bits, self.group_size, self.symmetric)

    @property
    def code_range(self) -> tuple[int, int]:
        return self.integers.code_range

    def scales(self, low: torch.Tensor, high: torch.Tensor) -> Scales:
        return self.integers.scales(low, high)

    def encode_(self, values, scales: Scales, offset=None) -> torch.Tensor:
        return self.integers.encode_(values, scales, offset)

    def levels_(self, codes: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
        return self.integers.levels_(codes, zero_point)

    def unclipped(self, ratios: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
        return self.integers.unclipped(ratios, zero_point)


KINDS = pytest.mark.parametrize("kind", [IntegerGrid, PlainGrid], ids=["fused", "autograd"])


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def expected_tokens(round_trip):
    return lambda values, grid: round_trip(values, 1.0, 1.0, grid)


def value_and_gradient(function, values: torch.Tensor, grid: Grid):
    values = values.clone().requires_grad_()
    output = function(values, grid)
    (gradient,) = torch.autograd.grad((output * normal(*values.shape, seed=9)).sum(), values)
    return output.detach(), gradient


@KINDS
@SYMMETRY
@BITS
@pytest.mark.parametrize("shape", [(5, 32), (2, 5, 32), (2, 4, 5, 8), (3, 1)])
def test_tokens_match_autograd(shape, bits, symmetric, kind, expected_tokens, assert_near):
    values, grid = normal(*shape) + 0.3, kind(bits, None, symmetric)
    output, gradient = value_and_gradient(fake_quantize_tokens, values, grid)
    expected, expected_gradient = value_and_gradient(expected_tokens, values, grid)
    assert_near(output, expected, "value")
    assert_near(gradient, expected_gradient, "gradient")


@KINDS
@SYMMETRY
def test_special_tokens_match_autograd(special, symmetric, kind, expected_tokens, assert_near):
    what, row = special
    grid = kind(4, None, symmetric)
    output, gradient = value_and_gradient(fake_quantize_tokens, row[None], grid)
    expected, expected_gradient = value_and_gradient(expected_tokens, row[None], grid)
    assert_near(output, expected, "value", 0)
    if what == "one value":  # a minimum of exactly 0: the range does not move with it
        where = torch.arange(len(row)) == 3
        gradient, expected_gradient = gradient[:, where], expected_gradient[:, where]
    assert_near(gradient, expected_gradient, "gradient")


@KINDS
@SYMMETRY
def test_groups_of_a_token_have_scales_of_their_own(symmetric, kind):
    values = normal(2, 5, 32)
    found = value_and_gradient(fake_quantize_tokens, values, kind(4, 8, symmetric))
    apart = value_and_gradient(
        fake_quantize_tokens, values.view(2, 5, 4, 8), kind(4, None, symmetric)
    )
    assert torch.equal(found[0].view(2, 5, 4, 8), apart[0])
    whole = fake_quantize_tokens(values, kind(4, None, symmetric))
    assert not torch.allclose(found[0], whole)


@KINDS
@SYMMETRY
@BITS
def test_clipped_ranges_match_autograd(bits, symmetric, kind, assert_near):
    """By the clipped extremes, written out: values, and gradients to them and to the clipping."""
    values, clip = normal(2, 5, 32) + 0.3, torch.tensor([0.6, 0.8])
    grid = kind(bits, None, symmetric)

    def plain(values, clip):
        low = values.amin(-1, keepdim=True).clamp(max=0) * clip[0]
        high = values.amax(-1, keepdim=True).clamp(min=0) * clip[1]
        scales = grid.scales(low, high)
        ratios = values / scales.scale
        rounded = ratios + (ratios.round() - ratios).detach()
        codes = (rounded + scales.zero_point).clamp(*grid.code_range)
        return (codes - scales.zero_point) * scales.scale

    results = []
    for function in (
        plain,
        lambda values, clip: fake_quantize_tokens(values, grid, clip=clip),
    ):
        leaves = values.clone().requires_grad_(), clip.clone().requires_grad_()
        output = function(*leaves)
        weights = normal(*values.shape, seed=9)
        results.append((output.detach(), *torch.autograd.grad((output * weights).sum(), leaves)))
    for found, expected, what in zip(
        *results, ("value", "gradient", "to the clipping"), strict=True
    ):
        assert_near(found, expected, what)
    assert not torch.equal(results[1][0], fake_quantize_tokens(values, grid))


@KINDS
def test_inputs_are_not_changed(kind):
    values = normal(24, 64)
    before = values.clone()
    fake_quantize_tokens(values.requires_grad_(), kind(4)).square().sum().backward()
    assert torch.equal(values, before)


@KINDS
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_arithmetic_is_float32_whatever_the_dtypes(stored, dtype, kind):
    values = normal(24, 64).to(stored)
    found = fake_quantize_tokens(values, kind(4), dtype)
    assert found.dtype == dtype
    assert torch.equal(found, fake_quantize_tokens(values.float(), kind(4)).to(dtype))


@SYMMETRY
@pytest.mark.parametrize("elements", [1, 100, 128, 1000])
def test_results_do_not_depend_on_the_chunk_size(elements, symmetric, monkeypatch):
    values, grid = normal(2, 12, 64), IntegerGrid(4, None, symmetric)
    results = []
    for chunk in (1 << 17, elements):
        monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", chunk)
        results.append(value_and_gradient(fake_quantize_tokens, values, grid))
    for whole, parts in zip(*results, strict=True):
        assert torch.equal(parts, whole)


@KINDS
def test_tokens_that_are_not_contiguous(kind):
    values = normal(2, 4, 5, 8).transpose(1, 2)
    expected = fake_quantize_tokens(values.clone(), kind(4))
    assert torch.equal(fake_quantize_tokens(values, kind(4)), expected)


@KINDS
@SYMMETRY
@BITS
def test_one_token_does_not_touch_another(bits, symmetric, kind):
    values, grid = normal(6, 16), kind(bits, None, symmetric)
    alone = torch.cat([fake_quantize_tokens(row[None], grid) for row in values])
    assert torch.equal(fake_quantize_tokens(values, grid), alone)


@SYMMETRY
@BITS
def test_compressed_tensors_quantises_tokens_the_same(bits, symmetric, far_from_ties):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    arguments = quantization.QuantizationArgs(
        num_bits=bits, symmetric=symmetric, strategy="token", dynamic=True
    )
    values = normal(2, 6, 32)
    scale, zero_point = compute_dynamic_scales_and_zp(values, arguments, torch.nn.Module())
    theirs = fake_quantize(values, scale, zero_point, arguments)
    ours = fake_quantize_tokens(values, IntegerGrid(bits, None, symmetric))
    sure = far_from_ties(values / scale)
    torch.testing.assert_close(ours[sure], theirs[sure], rtol=1e-5, atol=1e-7)
    if symmetric:  # the largest value is a tie: -7.5 is -8 or -7 by the last bit of the scale
        assert torch.equal(ours, theirs)
