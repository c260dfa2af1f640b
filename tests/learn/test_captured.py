"""Recorded steps: the same bytes as steps that are taken one by one."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from lrquant.blocks.plan import FULL_PRECISION, Plan, learned_by
from lrquant.blocks.workbench import advance_full_precision, make_workbench
from lrquant.config.groups import Computing, Learning
from lrquant.config.scheme import Scheme
from lrquant.config.schemes import Schemes
from lrquant.data.feeds import Feed
from lrquant.errors import LRQuantError
from lrquant.ingredients.base.statistics import ChannelStatistics
from lrquant.learn import captured
from lrquant.learn.block_data import BlockData
from lrquant.learn.fit import fit_block
from lrquant.learn.share import shared_inputs
from lrquant.learn.window import Window
from lrquant.model.loading import from_module
from lrquant.team.team import ALONE

LEARNED = {"lwc": True, "let": True, "rotation": True, "rounding": True}
LEARNING = Learning(4, loss="mse+nlc", dynamic_weights=True, two_branch=True, keep_best=True)


@pytest.fixture
def fitted(make_model, make_bench, token_ids):
    """fitted(record, …) -> losses and learned parameters of a block, or of a window of blocks."""

    def fit(recorder, family="llama", scheme="W4A4", learning=LEARNING, blocks=1, ids=None):
        plan = Plan(Schemes(Scheme.parse(scheme)), learned_by(**LEARNED))
        bench = make_bench(make_model(family), plan=plan)
        feed = Feed.of_tokens(token_ids(6, 12)) if ids is None else ids
        entry, share = shared_inputs(bench, feed, learning.batch_size, 1)
        inputs, *targets = bench.streams(entry, 3)
        entry.embed(inputs)
        views, full = [], inputs
        for index in range(blocks):
            statistics, stored = ChannelStatistics(), bench.stored(index)
            for stream in targets:
                observe = statistics.observe
                advance_full_precision(bench, index, stored, entry, full, stream, observe)
            full = targets[0]
            views.append(bench.view(index, stored))
            views[-1].initialize(statistics)
        runners = [bench.runner(index, view) for index, view in enumerate(views)]
        data = BlockData(0, entry, inputs, tuple(targets), blocks, share)
        with Window(0, views, runners) if blocks > 1 else runners[0] as runner:
            view = runner if blocks > 1 else views[0]
            report = fit_block(view, runner, data, learning, record=recorder)
        return report.epoch_losses, report.held_losses, view.parameters

    return fit


@pytest.fixture
def counting(record):
    """counting() -> records as a CPU can, and counts steps that are replayed."""

    class Counting:
        recorded = replayed = 0

        def __call__(self, step):
            self.recorded += 1
            loss, replay = record(step)

            def counted():
                self.replayed += 1
                replay()

            return loss, counted

    return Counting


def same(left, right):
    *losses, parameters = left
    *others, expected = right
    assert losses == others
    assert parameters.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(parameters[name], values), name


@pytest.mark.parametrize(
    ("family", "scheme"), [("llama", "W4A4"), ("opt", "W3A16g16"), ("gemma2", "W4A8")]
)
def test_replayed_steps_give_the_same_bytes(fitted, counting, family, scheme):
    recorder = counting()
    found = fitted(recorder, family, scheme)
    same(found, fitted(None, family, scheme))
    assert (recorder.recorded, recorder.replayed) == (1, 4 * 6 - captured.TAKEN)


def test_steps_of_several_batches_and_windows_too(fitted, counting):
    learning = dataclasses.replace(LEARNING, batch_size=3)
    for blocks in (1, 2):
        recorder = counting()
        found = fitted(recorder, learning=learning, blocks=blocks)
        same(found, fitted(None, learning=learning, blocks=blocks))
        assert (recorder.recorded, recorder.replayed) == (1, 4 * 2 - captured.TAKEN)


def test_batches_of_other_shapes_are_recorded_apart_and_few_kinds_are(
    fitted, counting, token_ids, monkeypatch
):
    ids = [token_ids(1, tokens)[0] for tokens in (8, 12, 8, 12, 10, 8)]
    feed = Feed([{"input_ids": each[None]} for each in ids])
    recorder = counting()
    same(fitted(recorder, ids=feed), fitted(None, ids=feed))
    assert recorder.recorded == 3 and recorder.replayed == 4 * 6 - 3 * captured.TAKEN
    monkeypatch.setattr(captured, "MOST", 1)
    few = counting()
    same(fitted(few, ids=feed), fitted(None, ids=feed))
    assert few.recorded == 1 and few.replayed == 4 * 3 - captured.TAKEN


def test_a_step_that_forgets_something_would_be_seen(fitted, counting, monkeypatch):
    """The recorded step reads its own tensors: one that is not copied to makes another result."""
    monkeypatch.setattr(torch.Tensor, "copy_", _forgetful(torch.Tensor.copy_))
    with pytest.raises(AssertionError):
        same(fitted(counting()), fitted(None))


def _forgetful(copy):
    def copy_(self, other):
        return self if self.dim() == 3 and self.shape[-1] == 32 else copy(self, other)

    return copy_


def test_experts_and_steps_of_several_processes_are_not_recorded(
    make_model, make_bench, record, monkeypatch
):
    monkeypatch.setattr(captured, "cuda_graphs", lambda: record)
    for family, expected in (("llama", record), ("mixtral", None)):
        bench = dataclasses.replace(make_bench(make_model(family)), captured=True)
        views = [bench.view(0, bench.stored(0))]
        assert captured.recorder(bench, views, ALONE) is expected
        for left in (dataclasses.replace(bench, captured=False), bench):
            team = SimpleNamespace(size=1 if left is not bench else 2)
            assert captured.recorder(left, views, team) is None


def test_what_blocks_leave_for_later_ones_is_not_recorded(fitted, counting):
    """No tensor that a block sets can be one that the recorded step reads."""
    recorder = counting()
    same(fitted(recorder, "gemma3n"), fitted(None, "gemma3n"))
    assert recorder.recorded == 0


def test_where_there_are_no_cuda_graphs_the_setting_is_refused(make_model):
    computing = Computing("cpu", "float32", "host", cuda_graphs=True)
    with pytest.raises(LRQuantError, match="--cuda-graphs: this computes on cpu"):
        make_workbench(from_module(make_model("llama")), FULL_PRECISION, computing)
