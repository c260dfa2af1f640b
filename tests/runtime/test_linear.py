"""A native linear by itself."""

from __future__ import annotations

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
