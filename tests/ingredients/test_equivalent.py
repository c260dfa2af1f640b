"""Learnable equivalent transformation: the published start and how sites compose."""

from __future__ import annotations

import math

import pytest
import torch

from lrquant.architectures.sites import (
    Site,
    norm_site,
    query_key_site,
    up_down_site,
    value_output_site,
)
from lrquant.config.choices import KINDS
from lrquant.errors import LRQuantError
from lrquant.ingredients.base.block import BlockShapes, Start
from lrquant.ingredients.base.folding import Factors
from lrquant.ingredients.base.statistics import ChannelStatistics
from lrquant.ingredients.equivalent import Equivalent, logarithmic_scale

NORM = norm_site("norm", ("q", "k", "v"), 4)
VALUE_OUTPUT = value_output_site("v", "o", heads=4, kv_heads=2, head_dim=2)
QUERY_KEY = query_key_site("q", "k", 4, 2, 2, rotary="half")
UP_DOWN = up_down_site("up", "down", 3)


@pytest.fixture
def statistics():
    return ChannelStatistics(
        maxima={
            "block.q": torch.tensor([0.5, 1.0, 100.0, 0.0]),
            "block.o": torch.tensor([1.0, 2, 5, 1, 3, 3, 1, 9]),
            "block.down": torch.tensor([1.0, 2, 3]),
        },
        midpoints={
            "block.q": torch.tensor([0.1, -0.2, 3.0, 0.0]),
            "block.o": torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8]),
        },
    )


def shapes_of(sites: tuple[Site, ...]) -> BlockShapes:
    return BlockShapes({}, sites, frozenset(), torch.device("cpu"))


def start_of(sites, statistics, block="block", shift="never") -> dict[str, torch.Tensor]:
    """The parameters that sites start with."""
    learned = Equivalent(let=True, let_sites=KINDS, let_shift=shift)
    start = Start(block, statistics, lambda name: torch.empty(0), Factors())
    parameters = learned.start(shapes_of(sites), start)
    shapes = {name: tuple(values.shape) for name, values in parameters.items()}
    assert shapes == learned.shapes(shapes_of(sites))
    return parameters


def folded(sites, parameters: dict[str, torch.Tensor]) -> Factors:
    factors = Factors()
    Equivalent(let=True, let_sites=KINDS).fold(shapes_of(sites), parameters, factors)
    return factors


@pytest.mark.parametrize("a", [1e-3, 0.5, 1.0, 2.0, 117.0, 6e4])
def test_logarithmic_scale(a):
    found = float(logarithmic_scale(torch.tensor([a])))
    assert found == pytest.approx(a / math.log2(2 + a), rel=1e-6)


def test_logarithmic_scale_of_a_silent_channel_is_positive():
    found = logarithmic_scale(torch.tensor([0.0, 1e-9, 1e-5]))
    assert torch.equal(found, torch.full((3,), 1e-5))


def test_start_of_scales(statistics):
    sites = (NORM, VALUE_OUTPUT, QUERY_KEY, UP_DOWN)
    found = start_of(sites, statistics)
    assert found.keys() == {f"let.{site.name}.scale" for site in sites}
    maxima = statistics.maxima
    assert torch.equal(found["let.norm.scale"], logarithmic_scale(maxima["block.q"]))
    assert torch.equal(found["let.down.scale"], logarithmic_scale(maxima["block.down"]))
    # o_proj reads 4 heads of 2 channels; heads 0, 1 and heads 2, 3 share a value head.
    of_value = torch.tensor([5.0, 2.0, 3.0, 9.0])
    assert torch.equal(found["let.o.scale"], logarithmic_scale(of_value))
    assert torch.equal(found["let.q:k.scale"], torch.ones(2))
    assert all(values.dtype == torch.float32 for values in found.values())


def test_where_consumers_carry_the_square_the_scale_is_its_root(statistics):
    """What down reads is then divided by as much as without: its start is the same."""
    squared = up_down_site("up", "down", 3, power=2)
    found = start_of((squared,), statistics)
    expected = logarithmic_scale(statistics.maxima["block.down"])
    torch.testing.assert_close(found["let.down.scale"].square(), expected)
    factors = folded((squared,), found)
    torch.testing.assert_close(factors.columns["down"], expected)
    torch.testing.assert_close(factors.rows["up"], expected.rsqrt())


def test_start_of_shifts(statistics):
    found = start_of((NORM, VALUE_OUTPUT), statistics, shift="always")
    assert torch.equal(found["let.norm.shift"], statistics.midpoints["block.q"])
    assert torch.equal(found["let.o.shift"], torch.tensor([2.0, 3.0, 6.0, 7.0]))


def test_shifts_start_at_zero_without_midpoints(statistics):
    statistics.midpoints.clear()
    found = start_of((NORM,), statistics, shift="always")
    assert torch.equal(found["let.norm.shift"], torch.zeros(4))


def test_statistics_of_another_model_are_refused(statistics):
    with pytest.raises(LRQuantError, match=r"no entry for other\.q"):
        start_of((NORM,), statistics, "other")
    statistics.maxima["block.q"] = torch.ones(5)
    with pytest.raises(LRQuantError, match=r"block\.q has 5 channels, this model has 4"):
        start_of((NORM,), statistics)


def test_midpoints_of_another_model_are_refused(statistics):
    statistics.midpoints["block.q"] = torch.ones(5)
    with pytest.raises(LRQuantError, match=r"block\.q has 5 channels, this model has 4"):
        start_of((NORM,), statistics, shift="always")


def test_factors_of_all_sites_compose():
    s, t = torch.tensor([1.0, 2, 3, 4]), torch.tensor([2.0, 5])
    u, w = torch.tensor([0.5, 1, 2, 3]), torch.tensor([3.0, 4, 5])
    delta, epsilon = torch.tensor([1.0, -1, 2, 0]), torch.tensor([7.0, 8, 9, 10])
    factors = folded(
        (NORM, VALUE_OUTPUT, QUERY_KEY, UP_DOWN),
        {
            "let.norm.scale": s,
            "let.norm.shift": delta,
            "let.o.scale": u,
            "let.o.shift": epsilon,
            "let.q:k.scale": t,
            "let.down.scale": w,
        },
    )
    repeated = torch.tensor([0, 1, 0, 1, 2, 3, 2, 3])
    expected = {
        "norms": {"norm": 1 / s},
        "rows": {
            "q": 1 / t[[0, 0, 0, 0, 1, 1, 1, 1]],
            "k": t[[0, 0, 1, 1]],
            "v": 1 / u,
            "up": 1 / w,
        },
        "columns": {"q": s, "k": s, "v": s, "o": u[repeated], "down": w},
        "subtract": {"norm": delta, "v": epsilon},
        "add": {"q": delta, "k": delta, "v": delta, "o": epsilon[repeated]},
    }
    for table, values in expected.items():
        found = getattr(factors, table)
        assert found.keys() == values.keys()
        for module, value in values.items():
            assert torch.equal(found[module], value), (table, module)


def test_two_sites_on_one_axis_multiply():
    other = up_down_site("k", "unused", 4)
    key = query_key_site("q", "k", 4, 2, 2, rotary=None)
    t, w = torch.tensor([1.0, 2, 3, 4]), torch.tensor([2.0, 4, 8, 16])
    factors = folded((key, other), {"let.q:k.scale": t, "let.unused.scale": w})
    assert torch.equal(factors.rows["k"], t * (1 / w))
