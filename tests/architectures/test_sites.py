"""Sites: which element of a scale belongs to which channel, by hand and against the rotation."""

from __future__ import annotations

import pytest
import torch

from lrquant.architectures.sites import norm_site, query_key_site, up_down_site, value_output_site


def test_norm_site():
    site = norm_site("norm", ("q", "k", "v"), 4)
    assert (site.kind, site.size, site.measured, site.shiftable) == ("norm", 4, "q", True)
    assert (site.producer.module, site.producer.axis, site.producer.power) == ("norm", "norm", -1)
    assert [fold.module for fold in site.consumers] == ["q", "k", "v"]
    assert {(fold.axis, fold.power) for fold in site.consumers} == {("columns", 1)}
    assert all(fold.index == (0, 1, 2, 3) for fold in site.folds)


def test_value_output_site_repeats_over_the_query_heads_of_a_group():
    site = value_output_site("v", "o", heads=4, kv_heads=2, head_dim=3)
    assert (site.kind, site.size, site.measured, site.shiftable) == ("value_output", 6, "o", True)
    producer, consumer = site.folds
    assert (producer.axis, producer.power, producer.index) == ("rows", -1, (0, 1, 2, 3, 4, 5))
    assert (consumer.axis, consumer.power) == ("columns", 1)
    assert consumer.index == (0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5)


def test_value_output_site_without_groups():
    site = value_output_site("v", "o", heads=2, kv_heads=2, head_dim=3)
    assert site.producer.index == site.consumers[0].index == (0, 1, 2, 3, 4, 5)


@pytest.mark.parametrize(
    "rotary, size, of_query, of_key",
    [
        (None, 8, (0, 1, 2, 3) * 2 + (4, 5, 6, 7) * 2, (0, 1, 2, 3, 4, 5, 6, 7)),
        ("half", 4, (0, 1, 0, 1) * 2 + (2, 3, 2, 3) * 2, (0, 1, 0, 1, 2, 3, 2, 3)),
        ("interleaved", 4, (0, 0, 1, 1) * 2 + (2, 2, 3, 3) * 2, (0, 0, 1, 1, 2, 2, 3, 3)),
    ],
)
def test_query_key_site(rotary, size, of_query, of_key):
    site = query_key_site("q", "k", heads=4, kv_heads=2, head_dim=4, rotary=rotary)
    assert (site.kind, site.size, site.measured, site.shiftable) == ("query_key", size, None, False)
    query, key = site.folds
    assert (query.module, query.axis, query.power, query.index) == ("q", "rows", -1, of_query)
    assert (key.module, key.axis, key.power, key.index) == ("k", "rows", 1, of_key)


def test_query_key_site_where_rope_turns_a_part_of_each_head():
    """The first four of six channels turn; the two others are free."""
    for rotary, first in (("half", (0, 1, 0, 1)), ("interleaved", (0, 0, 1, 1))):
        site = query_key_site("q", "k", 2, 1, 6, rotary, rotary_dim=4)
        assert site.size == 4 and site.consumers[0].index == (*first, 2, 3)
        assert site.producer.index == (*first, 2, 3) * 2


def test_queries_key_and_value_of_each_head_in_turn():
    """Two key/value heads of two channels, each with two queries: rows q q k v, twice."""
    value = value_output_site("qkv", "o", 4, 2, 2, grouped=True)
    others = (-1,) * 6
    assert value.producer.index == (*others, 0, 1, *others, 2, 3)
    assert value.consumers[0].index == (0, 1, 0, 1, 2, 3, 2, 3)
    pair = query_key_site("qkv", "qkv", 4, 2, 2, rotary="half", grouped=True)
    assert pair.producer.index == (0, 0, 0, 0, *others[:4], 1, 1, 1, 1, *others[:4])
    assert pair.consumers[0].index == (*others[:4], 0, 0, *others, 1, 1, -1, -1)


def test_no_shift_where_a_gate_stands_between_values_and_output():
    assert not value_output_site("v", "o", 2, 2, 3, shiftable=False).shiftable


def test_squared_relu_gives_down_the_square():
    (up, down) = up_down_site("up", "down", 3, power=2).folds
    assert (up.power, down.power) == (-1, 2)


def test_up_down_site():
    site = up_down_site("up", "down", 5)
    assert (site.kind, site.size, site.measured, site.shiftable) == ("up_down", 5, "down", False)
    assert [(f.module, f.axis, f.power) for f in site.folds] == [
        ("up", "rows", -1),
        ("down", "columns", 1),
    ]


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (4, 1), (6, 3)])
@pytest.mark.parametrize("rotary", [None, "half", "interleaved"])
def test_every_element_is_used_and_every_channel_served(heads, kv_heads, rotary):
    sites = [
        value_output_site("v", "o", heads, kv_heads, 8),
        query_key_site("q", "k", heads, kv_heads, 8, rotary),
    ]
    widths = {"v": kv_heads * 8, "o": heads * 8, "q": heads * 8, "k": kv_heads * 8}
    for site in sites:
        for fold in site.folds:
            assert len(fold.index) == widths[fold.module]
            assert set(fold.index) == set(range(site.size))


def rotate(states: torch.Tensor, convention: str) -> torch.Tensor:
    """Turn the channel pairs of (tokens, head_dim) by angles that differ by token and pair."""
    tokens, head_dim = states.shape
    angles = torch.arange(1, tokens + 1)[:, None] * torch.arange(1, head_dim // 2 + 1) / 3.0
    cos, sin = angles.cos().double(), angles.sin().double()
    if convention == "half":
        left, right = states[:, : head_dim // 2], states[:, head_dim // 2 :]
    else:
        left, right = states[:, ::2], states[:, 1::2]
    turned = left * cos - right * sin, right * cos + left * sin
    return torch.cat(turned, -1) if convention == "half" else torch.stack(turned, -1).flatten(1)


@pytest.mark.parametrize("convention", ["half", "interleaved"])
@pytest.mark.parametrize("declared", [None, "half", "interleaved"])
def test_scales_pass_the_rotation_only_under_its_own_convention(declared, convention):
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(5, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    site = query_key_site("q", "k", heads=1, kv_heads=1, head_dim=8, rotary=declared)
    t = 0.5 + 1.5 * torch.rand(site.size, generator=generator, dtype=torch.float64)
    of_query, of_key = (t[torch.tensor(fold.index)] ** fold.power for fold in site.folds)
    before = rotate(query, convention) @ rotate(key, convention).T
    after = rotate(query * of_query, convention) @ rotate(key * of_key, convention).T
    assert torch.allclose(before, after, rtol=1e-12) == (declared == convention)
