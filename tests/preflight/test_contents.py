"""What is quantised, matrix by matrix, and what is not: by kind of block, experts together."""

from __future__ import annotations

import pytest

from lrquant.config.config import Config
from lrquant.model.loading import from_module
from lrquant.preflight.checks import preflight
from lrquant.preflight.contents import contents, spans
from lrquant.reports.preflight import preflight_text, preflight_values


@pytest.fixture
def kinds(make_model):
    def of(name, **settings):
        schemes = Config(**{"scheme": "W4A16", **settings}).resolved().schemes
        return contents(from_module(make_model(name)), schemes)

    return of


def test_blocks_alike_stand_together(kinds):
    (every,) = kinds("llama")
    assert every.blocks == (0, 1) and list(every.tensors) == ["W4A16"]
    assert every.tensors["W4A16"][0] == ("self_attn.q_proj", (32, 32))


def test_each_kind_has_its_own_and_what_stays(kinds):
    delta, attention = kinds("qwen3_5")
    names = {scheme: [name for name, _ in own] for scheme, own in delta.tensors.items()}
    assert names[""] == [f"linear_attn.{n}" for n in ("conv1d", "in_proj_b", "in_proj_a")]
    assert "linear_attn.out_proj" in names["W4A16"] and list(attention.tensors) == ["W4A16"]


def test_a_scheme_of_its_own_and_none_are_told(kinds):
    first, second = kinds("llama", scheme_for=("layers.1.mlp=W8A16", "o_proj=W16A16"))
    assert list(first.tensors) == ["W4A16", ""] and first.tensors[""] == [
        ("self_attn.o_proj", (32, 32))
    ]
    assert set(second.tensors) == {"W4A16", "W8A16", ""}


def test_block_numbers_are_short():
    assert spans((0, 1, 2, 4, 5, 9)) == "0-2, 4-5, 9" and spans((3,)) == "3"


def test_the_pre_flight_says_it(make_model):
    settings = {"scheme": "W4A16", "nsamples": 2, "seqlen": 12, "format": "lrquant"}
    found = preflight(settings, from_module(make_model("lfm2")))
    text, values = preflight_text(found), preflight_values(found)
    assert "block 0 (1 of 2):\n  W4A16: conv.in_proj.b 32x32, " in text
    assert "  floating point: conv.conv 32x1x3" in text
    assert values["contents"][0]["blocks"] == (0,) and values["carried"] == []
