"""Weight clipping: its logits, and the search for where they start."""

from __future__ import annotations

import pytest
import torch
from lrquant.numerics.affine import fake_quantize_weight

from lrquant.ingredients.clipping import (
    PUBLISHED_LOGIT,
    SEARCHED_STRENGTHS,
    clipping_parameters,
    clipping_strengths,
    searched_logits,
)
from lrquant.numerics import affine

CPU = torch.device("cpu")


@pytest.fixture
def weight():
    return torch.randn(6, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def importance():
    return torch.rand(64, generator=torch.Generator().manual_seed(1)) ** 4


def error(weight, importance, logit, bits, group_size, symmetric):
    """Weighted squared error of each row and group at one logit, in float64."""
    strength = torch.full((6, 64 // group_size), logit).sigmoid()
    quantized = fake_quantize_weight(
        weight, None, None, strength, strength, bits, group_size, symmetric
    )
    weighted = (quantized.double() - weight.double()).square() * importance.double()
    return weighted.view(6, -1, group_size).sum(-1)


def test_parameters_at_one_logit_or_one_a_group():
    found = clipping_parameters("q", 3, 2, PUBLISHED_LOGIT, CPU)
    assert list(found) == ["lwc.q.upper", "lwc.q.lower"]
    assert all(torch.equal(values, torch.full((3, 2), 4.0)) for values in found.values())
    logits = torch.arange(6.0).view(3, 2)
    found = clipping_parameters("q", 3, 2, logits, CPU)
    assert all(torch.equal(values, logits) for values in found.values())
    found["lwc.q.upper"] += 1
    assert not torch.equal(found["lwc.q.upper"], found["lwc.q.lower"]), "two tensors, not one"
    assert torch.equal(clipping_strengths(found, "q")[1], logits.sigmoid())
    assert clipping_strengths(found, "k") == (None, None)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [64, 16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_search_finds_the_least_error(weight, importance, bits, group_size, symmetric):
    settings = bits, group_size, symmetric
    found = searched_logits(weight, None, None, importance, *settings)
    tried = [PUBLISHED_LOGIT, *torch.logit(torch.tensor(SEARCHED_STRENGTHS)).tolist()]
    errors = torch.stack([error(weight, importance, logit, *settings) for logit in tried])
    chosen = (found[None] - torch.tensor(tried)[:, None, None]).abs().argmin(0)
    assert torch.allclose(errors.gather(0, chosen[None])[0], errors.amin(0), rtol=1e-5)
    if bits <= 3:
        assert (errors.amin(0) < 0.9 * errors[0]).any(), "low bits gain, or nothing was searched"


def test_what_a_channel_matters_decides(weight):
    """A row whose large element matters is not clipped; one whose small ones matter is."""
    weight = 0.1 * weight
    weight[:, 0] = 2.0
    large, small = torch.full((2, 64), 1e-6)
    large[0], small[1:] = 1.0, 1.0
    kept = searched_logits(weight, None, None, large, 3, 64, False).sigmoid()
    clipped = searched_logits(weight, None, None, small, 3, 64, False).sigmoid()
    assert (kept > 0.9).all() and (clipped < 0.6).all()


def test_the_searched_weight_has_its_factors(weight, importance):
    generator = torch.Generator().manual_seed(2)
    row, column = (torch.rand(size, generator=generator) * 3 + 0.1 for size in (6, 64))
    found = searched_logits(weight, row, column, importance, 3, 16, False)
    scaled = weight * row[:, None] * column
    assert torch.equal(found, searched_logits(scaled, None, None, importance, 3, 16, False))
    assert not torch.equal(found, searched_logits(weight, None, None, importance, 3, 16, False))


def test_the_search_does_not_depend_on_the_chunks(weight, importance, monkeypatch):
    whole = searched_logits(weight, None, None, importance, 3, 16, False)
    monkeypatch.setattr(affine, "_CHUNK_ELEMENTS", 100)
    assert torch.equal(whole, searched_logits(weight, None, None, importance, 3, 16, False))


def test_a_row_of_zeros_keeps_the_published_start(importance):
    found = searched_logits(torch.zeros(2, 64), None, None, importance, 3, 64, False)
    assert torch.equal(found, torch.full((2, 1), PUBLISHED_LOGIT))
