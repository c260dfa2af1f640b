"""A team: members with a share of the samples each learn what one with all of them learns."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch

from lrquant.blocks.inputs import BlockInputs
from lrquant.blocks.plan import Plan, learned_by
from lrquant.blocks.workbench import advance_full_precision
from lrquant.config.groups import Learning
from lrquant.config.scheme import Scheme
from lrquant.config.schemes import Schemes
from lrquant.ingredients.base.statistics import ChannelStatistics
from lrquant.learn.fit import BlockData, fit_block
from lrquant.learn.team import ALONE

SIZE = 2


class Threads:
    """Members of one process that wait for each other."""

    size = SIZE

    def __init__(self, rank: int, shared: list, barrier: threading.Barrier) -> None:
        self.rank, self._shared, self._barrier = rank, shared, barrier

    def _everyone(self, value):
        self._shared[self.rank] = value
        self._barrier.wait()
        values = list(self._shared)
        self._barrier.wait()
        return values

    def sum(self, values):
        return torch.stack(self._everyone(values.detach().clone())).sum(0)

    def maximum(self, values):
        return torch.stack(self._everyone(values.detach().clone())).amax(0)

    def first(self, value):
        return self._everyone(value)[0]


@pytest.fixture
def learned(make_model, make_bench, token_ids):
    """learned(samples, batch_size, team) -> the report and parameters of block 0."""

    def learn(samples, batch_size, team):
        plan = Plan(Schemes(Scheme(3, 16, 16)), learned_by(lwc=True, let=True, lwc_init=4.0))
        bench = dataclasses.replace(make_bench(make_model("llama")), plan=plan)
        entry = BlockInputs(bench.model, token_ids(4, 12)[samples], batch_size, bench.device)
        inputs, target = bench.streams(entry, 2)
        entry.embed(inputs)
        statistics, stored = ChannelStatistics(), bench.stored(0)
        advance_full_precision(bench, 0, stored, entry, inputs, target)
        view = bench.view(0, stored)
        widths = {f"{view.plan.name}.{name}": s.columns for name, s in view.shapes.matrices.items()}
        statistics.maxima = {name: torch.ones(width) for name, width in widths.items()}
        view.initialize(statistics)
        data = BlockData(0, entry, inputs, (target,), team=team)
        with bench.runner(0, view) as runner:
            report = fit_block(view, runner, data, Learning(3, loss="mse", keep_best=True))
        return report, view.parameters

    return learn


def test_two_members_learn_what_one_does_with_twice_the_batch(learned):
    report, expected = learned([0, 2, 1, 3], 2, ALONE)
    shared, barrier = [None] * SIZE, threading.Barrier(SIZE, timeout=60)
    outcomes = [None] * SIZE

    def member(rank: int) -> None:
        share = [0, 1] if rank == 0 else [2, 3]
        outcomes[rank] = learned(share, 1, Threads(rank, shared, barrier))

    threads = [threading.Thread(target=member, args=(rank,)) for rank in range(SIZE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (first, one), (second, other) = outcomes
    assert first.held_losses == second.held_losses and first.best_epoch == second.best_epoch
    assert first.initial_loss == pytest.approx(report.initial_loss, rel=1e-5)
    assert first.held_losses == pytest.approx(report.held_losses, rel=1e-3)
    for name, values in expected.items():
        assert torch.equal(one[name], other[name]), name
        torch.testing.assert_close(one[name], values, rtol=1e-2, atol=1e-2)


def test_members_statistics_are_those_of_all_samples():
    values = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
    whole, parts = ChannelStatistics(), [ChannelStatistics(), ChannelStatistics()]
    whole.observe("x", values)
    parts[0].observe("x", values[:3])
    parts[1].observe("x", values[3:])
    merged = parts[0].merged(parts[1:])
    assert merged.samples == whole.samples and torch.equal(merged.maxima["x"], whole.maxima["x"])
    for name in ("means", "squares"):
        torch.testing.assert_close(getattr(merged, name)["x"], getattr(whole, name)["x"])
    average = (3 * parts[0].midpoints["x"] + parts[1].midpoints["x"]) / 4
    torch.testing.assert_close(merged.midpoints["x"], average)


def test_alone_everything_is_as_it_is():
    values = torch.arange(3.0)
    assert ALONE.sum(values) is values and ALONE.maximum(values) is values
    assert ALONE.first("x") == "x" and (ALONE.size, ALONE.rank) == (1, 0)
