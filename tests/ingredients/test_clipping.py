"""Weight clipping: its logits, and the search for where they start."""

from __future__ import annotations

import pytest
import torch

from lrquant.ingredients.base.block import BlockShapes, MatrixShape, Start
from lrquant.ingredients.base.folding import Factors
from lrquant.ingredients.base.statistics import ChannelStatistics
from lrquant.ingredients.clipping import Clipping
from lrquant.numerics import chunks
from lrquant.numerics.grids.integer import IntegerGrid
from lrquant.numerics.recipe import Recipe
from lrquant.numerics.search import PUBLISHED_LOGIT, SEARCHED_STRENGTHS, searched_logits
from lrquant.numerics.weights import fake_quantize_weight

AS_IT_IS = Recipe()


@pytest.fixture
def weight():
    return torch.randn(6, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def importance():
    return torch.rand(64, generator=torch.Generator().manual_seed(1)) ** 4


def error(weight, importance, logit, grid):
    """Weighted squared error of each row and group at one logit, in float64."""
    strength = torch.full((6, 64 // grid.size(64)), logit).sigmoid()
    quantized = fake_quantize_weight(weight, Recipe(upper=strength, lower=strength), grid)
    weighted = (quantized.double() - weight.double()).square() * importance.double()
    return grid.grouped(weighted).sum(-1)


@pytest.fixture
def start_of(weight, importance):
    """start_of(clipping) -> its parameters of a block with `weight` as its matrix q, in groups."""
    grid, statistics = IntegerGrid(3, 16), ChannelStatistics()
    shape = MatrixShape(6, 64, grid, "q", True)
    block = BlockShapes({"q": shape}, (), frozenset(), torch.device("cpu"))
    statistics.means["block.q"] = torch.zeros(64)
    statistics.squares["block.q"] = importance
    statistics.samples["block.q"] = 1
    start = Start("block", statistics, lambda name: weight, Factors())
    return lambda clipping: clipping.start(block, start)


def test_parameters_at_one_logit_or_one_a_group(start_of, weight, importance):
    found = start_of(Clipping(lwc=True, lwc_init=PUBLISHED_LOGIT))
    assert list(found) == ["lwc.q.upper", "lwc.q.lower"]
    assert all(torch.equal(values, torch.full((6, 4), 4.0)) for values in found.values())
    found = start_of(Clipping(lwc=True))
    logits = searched_logits(weight, AS_IT_IS, importance, IntegerGrid(3, 16))
    assert len(logits.unique()) > 1
    assert all(torch.equal(values, logits) for values in found.values())
    found["lwc.q.upper"] += 1
    assert not torch.equal(found["lwc.q.upper"], found["lwc.q.lower"]), "two tensors, not one"
    recipe = Clipping(lwc=True).recipe("q", found)
    assert torch.equal(recipe.lower, logits.sigmoid())
    assert torch.equal(recipe.upper, (logits + 1).sigmoid())
    assert Clipping(lwc=True).recipe("k", found) is None


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [64, 16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_search_finds_the_least_error(weight, importance, bits, group_size, symmetric):
    grid = IntegerGrid(bits, group_size, symmetric)
    found = searched_logits(weight, AS_IT_IS, importance, grid)
    tried = [PUBLISHED_LOGIT, *torch.logit(torch.tensor(SEARCHED_STRENGTHS)).tolist()]
    errors = torch.stack([error(weight, importance, logit, grid) for logit in tried])
    chosen = (found[None] - torch.tensor(tried)[:, None, None]).abs().argmin(0)
    assert torch.allclose(errors.gather(0, chosen[None])[0], errors.amin(0), rtol=1e-5)
    if bits <= 3:
        assert (errors.amin(0) < 0.9 * errors[0]).any(), "low bits gain, or nothing was searched"


def test_what_a_channel_matters_decides(weight):
    """A row whose large element matters is not clipped; one whose small ones matter is."""
    weight = 0.1 * weight
    weight[:, 0] = 2.0
    grid = IntegerGrid(3)
    large, small = torch.full((2, 64), 1e-6)
    large[0], small[1:] = 1.0, 1.0
    kept = searched_logits(weight, AS_IT_IS, large, grid).sigmoid()
    clipped = searched_logits(weight, AS_IT_IS, small, grid).sigmoid()
    assert (kept > 0.9).all() and (clipped < 0.6).all()


def test_the_searched_weight_has_its_factors(weight, importance):
    generator = torch.Generator().manual_seed(2)
    row, column = (torch.rand(size, generator=generator) * 3 + 0.1 for size in (6, 64))
    grid = IntegerGrid(3, 16)
    found = searched_logits(weight, Recipe(rows=row, columns=column), importance, grid)
    scaled = weight * row[:, None] * column
    assert torch.equal(found, searched_logits(scaled, AS_IT_IS, importance, grid))
    assert not torch.equal(found, searched_logits(weight, AS_IT_IS, importance, grid))


def test_the_search_does_not_depend_on_the_chunks(weight, importance, monkeypatch):
    grid = IntegerGrid(3, 16)
    whole = searched_logits(weight, AS_IT_IS, importance, grid)
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", 100)
    assert torch.equal(whole, searched_logits(weight, AS_IT_IS, importance, grid))


def test_a_row_of_zeros_keeps_the_published_start(importance):
    found = searched_logits(torch.zeros(2, 64), AS_IT_IS, importance, IntegerGrid(3))
    assert torch.equal(found, torch.full((2, 1), PUBLISHED_LOGIT))
