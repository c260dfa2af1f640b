"""Fixtures that the tests of weights and of tokens on a grid share.

``special``       (kind, row) of each kind of row that is hard to quantise, (64,)
``round_trip``    round_trip(groups, upper, lower, grid, offset) -> the affine quantizer written
                  from its equations, by autograd alone
``assert_near``   assert_near(found, expected, what, size) -> equal but for sums rounded elsewhere
``far_from_ties``  far_from_ties(ratio) -> where a scale's last place cannot change the rounding
"""

from __future__ import annotations

import pytest
import torch

COLUMNS = 64


def _special_rows() -> dict[str, torch.Tensor]:
    mixed = torch.randn(COLUMNS, generator=torch.Generator().manual_seed(5))
    return {
        "mixed": mixed,
        "positive": mixed.abs() + 1,
        "negative": -mixed.abs() - 1,
        "constant positive": torch.full((COLUMNS,), 0.7),
        "constant negative": torch.full((COLUMNS,), -0.7),
        "zero": torch.zeros(COLUMNS),
        "one value": torch.zeros(COLUMNS).index_fill(0, torch.tensor(3), 2.5),
        "below the smallest scale": mixed * 1e-7,
        "huge": mixed * 1e20,
    }


@pytest.fixture(params=_special_rows())
def special(request):
    return request.param, _special_rows()[request.param]


def _rounded(values: torch.Tensor) -> torch.Tensor:
    """round(), with the gradient of the identity."""
    return values + (torch.round(values) - values).detach()


def _round_trip(groups, upper, lower, grid, offset=0.0) -> torch.Tensor:
    """algorithm.md, section 1, on (..., group_size) by autograd alone, in float32.

    The largest value of a symmetric group lies exactly between two codes, so a scale in the last
    place apart would choose another one: its order of operations is that of the tested code.
    """
    zero, bits = torch.zeros(()), grid.bits
    high = torch.maximum(groups.amax(-1, keepdim=True), zero) * upper
    low = torch.minimum(groups.amin(-1, keepdim=True), zero) * lower
    if grid.symmetric:
        code_min, code_max = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        scale = torch.maximum(high, -low) / ((2**bits - 1) / 2)
    else:
        code_min, code_max = 0, 2**bits - 1
        scale = (high - low) / code_max
    scale = scale.clamp(min=1e-5)
    if grid.symmetric:
        zero_point = torch.zeros_like(scale)
    else:
        zero_point = torch.round(-low / scale).clamp(0, code_max).detach()
    codes = (_rounded(groups / scale + offset) + zero_point).clamp(code_min, code_max)
    return scale * (codes - zero_point)


@pytest.fixture(scope="session")
def round_trip():
    return _round_trip


def _assert_near(found: torch.Tensor, expected: torch.Tensor, what: str, size: float = 1) -> None:
    """Equal but for the rounding of sums over values of about `size`."""
    assert found.shape == expected.shape and torch.isfinite(expected).all()
    error = float((found - expected).abs().max())
    assert error <= 5e-6 * float(expected.abs().max()) + 1e-6 * size, f"{what}: off by {error}"


@pytest.fixture(scope="session")
def assert_near():
    return _assert_near


@pytest.fixture(scope="session")
def far_from_ties():
    return lambda ratio: ((ratio - torch.floor(ratio)) - 0.5).abs() > 1e-3
