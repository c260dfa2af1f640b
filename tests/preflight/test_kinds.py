"""Kinds of blocks: one block of each is probed, and each block counts as those of its kind."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lrquant.blocks.plan import Plan
from lrquant.config.config import Config
from lrquant.config.groups import Learning
from lrquant.data.samples import Samples
from lrquant.preflight import kinds
from lrquant.preflight.checks import preflight
from lrquant.preflight.estimate import estimate_memory, learning_seconds, measuring_seconds
from lrquant.preflight.kinds import KindCosts, block_kinds, probe_kinds
from lrquant.preflight.load import TextLoad, language_load
from lrquant.preflight.probe import BlockCosts
from lrquant.reports.preflight import preflight_text

COSTS = BlockCosts(
    **dict.fromkeys(("read", "observed", "full", "start", "weights", "held", "freeze"), 1.0),
    **{"step": 10.0, "peak_memory": 9_000, "streams": 1_000, "rows": 16},
)
CHEAP = dataclasses.replace(COSTS, step=0.0, held=0.5, peak_memory=4_000)


@pytest.fixture
def load_of(make_bench, make_model):
    """load_of(blocks, settings) -> what the blocks of a small model are to learn on"""

    def make(blocks=4, **settings):
        config = Config(**{"scheme": "W4A4", "nsamples": 4, "seqlen": 16, **settings}).resolved()
        model = make_model("llama", num_hidden_layers=blocks)
        bench = make_bench(model, plan=Plan.of(config.quantizing))
        return language_load(bench, config.group(Learning), None, [16] * 4)

    return make


@pytest.fixture
def probed(monkeypatch):
    """The blocks that were probed; each costs as many seconds a step as its index says."""
    blocks = []

    def probe(load, index):
        blocks.append(index)
        return dataclasses.replace(COSTS, step=float(index))

    monkeypatch.setattr(kinds, "probe_block", probe)
    return blocks


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [(0, 1, 2, 3)]),
        ({"window": 3}, [(0, 1, 2, 3)]),
        ({"scheme_for": ("layers.0=W16A16",)}, [(0,), (1, 2, 3)]),
        ({"scheme_for": ("layers.2.mlp.up_proj=W8A4",)}, [(0, 1, 3), (2,)]),
        ({"scheme_for": ("layers.0=W16A16",), "window": 2}, [(0,), (1,), (2, 3)]),
        ({"scheme_for": ("o_proj=W8A4",)}, [(0, 1, 2, 3)]),
    ],
)
def test_blocks_by_kind(load_of, settings, expected):
    assert block_kinds(load_of(**settings)) == expected


def test_the_first_block_of_each_kind_is_probed(load_of, probed):
    costs = probe_kinds(load_of(scheme_for=("layers.1=W16A16",)))
    assert probed == [0, 1] and [each.blocks for each in costs] == [(0, 2, 3), (1,)]
    assert all(each.own for each in costs)


def test_rare_kinds_count_as_the_most_expensive_one(load_of, probed):
    """Six kinds, of which the four most frequent are measured."""
    other = tuple(f"layers.{index}=W{bits}A4" for index, bits in ((2, 2), (3, 2), (4, 3), (6, 5)))
    other += ("layers.7=W6A4", "layers.8=W7A4")
    costs = probe_kinds(load_of(9, scheme_for=other))
    assert probed == [0, 2, 4, 6]
    assert [(each.blocks, each.measured, each.own) for each in costs[3:]] == [
        ((6,), 6, True),
        ((7, 8), 6, False),
    ]
    assert costs[4].costs == costs[3].costs
    assert sorted(index for each in costs for index in each.blocks) == list(range(9))


def test_real_probes_of_two_kinds(load_of):
    """Nothing is learned of the block that is left alone, whatever window it is in."""
    alone = ("layers.0=W16A16",)
    few, many = sorted(probe_kinds(load_of(scheme_for=alone)), key=lambda each: len(each.blocks))
    assert few.costs.step == 0 < many.costs.step
    windows = probe_kinds(load_of(scheme_for=alone, window=2))
    first, second, _ = sorted(windows, key=lambda each: each.blocks)
    assert first.blocks == (0,) and first.costs.step > 0 < second.costs.step
    assert not any(each.costs.step for each in probe_kinds(load_of(scheme="W16A16", window=2)))


def test_a_mixed_scheme_is_estimated_near_the_uniform_one(load_of):
    """Costs of a clock that does not move: only the block that is left alone costs less."""
    load = load_of(30)
    uniform, mixed = [KindCosts(tuple(range(30)), 0, COSTS)], mixed_of(30)
    ratio = learning_seconds(load, mixed) / learning_seconds(load, uniform)
    assert 28 / 30 < ratio < 1
    from_block_0 = [KindCosts(tuple(range(30)), 0, CHEAP)]
    assert learning_seconds(load, from_block_0) < 0.1 * learning_seconds(load, uniform)
    text = Samples(torch.zeros((5, 8), dtype=torch.int64), "a", "", "", "")
    model, read = load.workbench.model, TextLoad([text], 8)
    seconds = [measuring_seconds(model, each, read, True) for each in (mixed, uniform)]
    assert 0.9 < seconds[0] / seconds[1] < 1
    memory = [estimate_memory(load, each, 2_000, False) for each in (mixed, uniform)]
    assert memory[0] == memory[1], "the largest of all kinds"


def mixed_of(blocks):
    return [KindCosts(tuple(range(1, blocks)), 1, COSTS), KindCosts((0,), 0, CHEAP)]


def test_finished_blocks_are_those_in_front(load_of):
    load = load_of(2)
    both, cheap, dear = (
        learning_seconds(load, costs, finished)
        for costs, finished in (
            (mixed_of(2), 1),
            ([KindCosts((0,), 0, CHEAP)], 1),
            ([KindCosts((1,), 1, COSTS)], 0),
        )
    )
    assert both == cheap + dear


def test_kinds_are_told(tmp_path, model_folder):
    text = tmp_path / "text.txt"
    text.write_text("some words, and some more of them. " * 20)
    asked = {"model": str(model_folder("llama", num_hidden_layers=3)), "scheme": "W4A16"}
    asked |= {"calib_dataset": str(text), "nsamples": 1, "seqlen": 16, "epochs": 1}
    asked |= {"output_dir": str(tmp_path / "run"), "precision": "float32"}
    mixed = preflight({**asked, "scheme_for": ("layers.0=W16A16",)})
    assert not mixed.failed and len(mixed.costs) == 2
    said = preflight_text(mixed)
    assert "block 1 and 1 like it: a learning step" in said
    assert "; block 0: a learning step 0 ms" in said
    said = preflight_text(preflight(asked))
    assert "measured here  a learning step" in said and "like it" not in said
    mixed.costs.append(dataclasses.replace(mixed.costs[0], blocks=(7, 8)))
    assert preflight_text(mixed).endswith("; 2 of other kinds counted like block 1")


def test_blocks_of_other_shapes_are_other_kinds(load_of):
    """Negative control: a bias in one block makes it another kind."""
    load = load_of(3)
    layer = load.workbench.model.blocks[2].self_attn.o_proj
    layer.bias = torch.nn.Parameter(layer.weight[:, 0], requires_grad=False)
    assert block_kinds(load) == [(0, 1), (2,)]
