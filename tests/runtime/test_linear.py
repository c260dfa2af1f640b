"""A native linear by itself."""

from __future__ import annotations

import pytest
import torch

from lrquant.config.scheme import Scheme
from lrquant.numerics.packing import packed_weight
from lrquant.runtime.linear import IntegerLinear


def test_totals_are_not_those_of_scales_of_half_precision():
    """int32 totals of 2048 products of int8 are beyond float16."""
    columns, rows = 2048, 24
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (rows, columns), generator=generator).to(torch.int8)
    linear = IntegerLinear(columns, rows, Scheme.parse("W8A8-sym"), bias=False)
    scale = torch.rand((rows, 1), generator=generator) * 1e-3
    linear.load_state_dict(packed_weight(codes, None, 8) | {"weight_scale": scale})
    linear.unpack()
    values = torch.randn((5, columns), generator=generator)
    with torch.no_grad():
        expected = values @ (codes.float() * scale).t()
        found = linear.to(torch.float16)(values.half())
    assert (found.float() - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("scheme", ["W4A4", "W4A4g64", "W4A4-ag64", "W4A4g64-ag32", "W4A16g64"])
@pytest.mark.parametrize("unpacked", [False, True])
def test_no_token_in_gives_none_out(scheme: str, unpacked: bool):
    """An expert that no token is sent to, whatever the groups of weights and activations."""
    linear = IntegerLinear(128, 16, Scheme.parse(scheme), bias=True)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.zero_()
        if unpacked:
            linear.unpack()
        assert linear(torch.zeros(2, 0, 128)).shape == (2, 0, 16)
