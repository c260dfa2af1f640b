"""Integer products against exact arithmetic in int64, on every path."""

from __future__ import annotations

import pytest
import torch

from lrquant.numerics import products
from lrquant.numerics.grids.integer import IntegerGrid
from lrquant.numerics.products import affine_product, centred, integer_product, quantize_tokens
from lrquant.numerics.tokens import fake_quantize_tokens


def random_codes(*shape, low=-128, high=127, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, generator=generator).to(torch.int8)


PRODUCTS = {
    "as chosen": integer_product,
    "through float32": products.float_product,
    "int8 instructions": lambda left, right: torch._int_mm(left, right.t()),
    "padded for CUDA": products.padded_product,
}


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("shape", [(1, 8, 3), (5, 13, 7), (33, 1025, 4), (2, 3000, 2)], ids=str)
def test_products_are_exact(product, shape):
    tokens, columns, rows = shape
    left, right = random_codes(tokens, columns), random_codes(rows, columns, seed=1)
    left[0], right[0] = -128, -128  # the largest sum there is
    expected = left.long() @ right.long().t()
    found = PRODUCTS[product](left, right)
    assert found.dtype == torch.int32 and torch.equal(found.long(), expected)


def test_a_longer_float_product_would_not_be_exact(monkeypatch):
    """Negative control of the limit on columns."""
    monkeypatch.setattr(products, "EXACT_COLUMNS", 1 << 15)
    left, right = random_codes(4, 1 << 15, low=100), random_codes(4, 1 << 15, low=100, seed=1)
    expected = left.long() @ right.long().t()
    assert not torch.equal(products.float_product(left, right).long(), expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_tokens_lie_on_the_grid_of_the_fake_quantizer(bits, symmetric):
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(40, 24, generator=generator) * torch.logspace(-4, 3, 40)[:, None]
    values[1], values[2], values[3] = 0, values[2].abs(), -values[3].abs()
    grid = IntegerGrid(bits, None, symmetric)
    codes, scale, zero_point = quantize_tokens(values, grid)
    assert codes.dtype == torch.int8 and scale.shape == zero_point.shape == (40, 1)
    decoded = scale * (codes.float() - zero_point)
    assert torch.equal(decoded, fake_quantize_tokens(values, grid))
    kept = (grid.code_range[1] + 1) // 2 if bits == 8 and not symmetric else 0
    smallest, largest = (code - kept for code in grid.code_range)
    assert smallest <= codes.min() and codes.max() <= largest


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_points_are_corrected_exactly(bits):
    top = (1 << bits) - 1
    generator = torch.Generator().manual_seed(bits)

    def draw(*shape):
        return torch.randint(0, top + 1, shape, generator=generator)

    tokens, weight = draw(9, 500), draw(6, 500)
    tokens[0], weight[0] = top, top
    token_zero, weight_zero = draw(9, 1), draw(1, 6)
    token_zero[0], weight_zero[0, 0] = 0, 0
    expected = (tokens - token_zero) @ (weight - weight_zero.t()).t()
    grid = IntegerGrid(bits)
    codes = centred(weight, grid)
    found = affine_product(
        centred(tokens, grid),
        centred(token_zero, grid).int(),
        (tokens - token_zero).sum(1, keepdim=True, dtype=torch.int32),
        codes,
        codes.sum(1, dtype=torch.int32)[None],
        centred(weight_zero, grid).int(),
    )
    assert torch.equal(found.long(), expected)
