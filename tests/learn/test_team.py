"""A team: members with a share of the samples each learn what one with all of them learns."""

from __future__ import annotations

import copy
import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from lrquant.blocks.inputs import BlockInputs
from lrquant.blocks.plan import Plan, learned_by
from lrquant.blocks.workbench import advance_full_precision
from lrquant.config.config import Config
from lrquant.config.groups import Adapting, Learning
from lrquant.config.scheme import Scheme
from lrquant.config.schemes import Schemes
from lrquant.data.feeds import Feed
from lrquant.data.samples import Samples
from lrquant.errors import LRQuantError
from lrquant.ingredients.base.statistics import ChannelStatistics
from lrquant.ingredients.tuning import Tuning
from lrquant.learn import fit
from lrquant.learn.adaptation import adapt
from lrquant.learn.fit import BlockData, fit_block
from lrquant.learn.model import learn_model
from lrquant.learn.objective import Objective
from lrquant.learn.team import ALONE, holds_for_all, require_even
from lrquant.runs.folder import RunFolder
from lrquant.runs.progress import Progress

SIZE = 2
ORDER = [0, 2, 1, 3]  # of one member's batches of 2, each with a sample of either share
SHARES = [0, 1], [2, 3]
IDENTITY = {"model": "m", "scheme": "s", "learning": {}, "data": {}, "precision": "float32"}


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

    def first(self, make):
        value = make() if self.rank == 0 else None
        theirs = self._everyone(copy.deepcopy(value))[0]  # nobody else's, of two
        return value if self.rank == 0 else theirs


def together(work):
    """What `work(team)` gives for each member, or refuses; no member waits for one that failed."""
    shared, barrier = [None] * SIZE, threading.Barrier(SIZE, timeout=60)

    def member(rank: int):
        try:
            return work(Threads(rank, shared, barrier))
        except LRQuantError as error:
            return error
        except Exception:
            barrier.abort()
            raise

    with ThreadPoolExecutor(SIZE) as pool:
        members = [pool.submit(member, rank) for rank in range(SIZE)]
    errors = [each.exception() for each in members]
    broken = threading.BrokenBarrierError
    for error in sorted(filter(None, errors), key=lambda error: isinstance(error, broken)):
        raise error
    return [each.result() for each in members]


@pytest.fixture
def feed(token_ids):
    """Four samples, of which each token may have a weight."""

    def make(weighted=False):
        samples = Feed.of_tokens(token_ids(4, 12))
        if not weighted:
            return samples
        generator = torch.Generator().manual_seed(3)
        sizes = torch.tensor([1.0, 0.2, 2.0, 5.0])
        weights = [size * torch.rand(12, generator=generator) for size in sizes]
        return dataclasses.replace(samples, weights=weights)

    return make


@pytest.fixture
def learned(make_model, make_bench):
    """learned(feed, batch_size, team) -> the report and parameters of block 0."""

    def learn(feed, batch_size, team, **settings):
        plan = Plan(Schemes(Scheme(3, 16, 16)), learned_by(lwc=True, let=True, lwc_init=4.0))
        bench = dataclasses.replace(make_bench(make_model("llama")), plan=plan)
        entry = BlockInputs(bench.model, feed, batch_size, bench.device)
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
            report = fit_block(view, runner, data, Learning(3, **settings))
        return report, view.parameters

    return learn


def assert_close(parameters, expected, tolerance):
    assert parameters.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(parameters[name], values, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("keep_best", [False, True])
@pytest.mark.parametrize(
    ("loss", "dynamic", "ema_init"),
    [("mse", False, "first"), ("mse", True, "first"), ("mse+nlc", True, "one")],
)
def test_two_members_learn_what_one_does_with_twice_the_batch(
    learned, feed, loss, dynamic, ema_init, keep_best, weighted
):
    """The logarithm of a cosine is no mean of tokens: of its parts there is a mean, as of batches'.

    So losses differ there by what they differ between batch sizes.
    """
    settings = {"loss": loss, "dynamic_weights": dynamic, "ema_init": ema_init}
    settings |= {"keep_best": keep_best}
    samples = feed(weighted)
    report, expected = learned(samples.only(ORDER), 2, ALONE, **settings)
    (first, one), (second, other) = together(
        lambda team: learned(samples.only(SHARES[team.rank]), 1, team, **settings)
    )
    same = "initial_loss", "epoch_losses", "held_losses", "best_epoch", "non_finite"
    assert [getattr(first, name) for name in same] == [getattr(second, name) for name in same]
    assert_close(one, other, 0)
    near = 1e-3 if loss == "mse" else 5e-2
    assert first.initial_loss == pytest.approx(report.initial_loss, rel=near)
    assert first.epoch_losses == pytest.approx(report.epoch_losses, rel=near)
    assert first.held_losses == pytest.approx(report.held_losses, rel=near)
    assert first.best_epoch == report.best_epoch
    assert_close(one, expected, 1e-2)


def test_a_member_whose_loss_is_not_finite_takes_all_back(learned, feed, monkeypatch):
    original, here = fit.loss_terms, threading.local()

    def loss(output, targets, kind, weights=None):
        terms = original(output, targets, kind, weights)
        return terms * float("nan") if here.fails and torch.is_grad_enabled() else terms

    def work(team):
        here.fails = team.rank == 1
        return learned(feed().only(SHARES[team.rank]), 1, team)

    monkeypatch.setattr(fit, "loss_terms", loss)
    (first, one), (second, other) = together(work)
    assert first.non_finite == second.non_finite == ["epoch 1: back to the best parameters so far"]
    assert_close(one, other, 0)


def test_a_parameter_that_one_member_s_samples_reach_is_the_same_for_all(make_model, make_bench):
    """As an expert's: nobody waits for a gradient that another does not have."""
    bench = make_bench(make_model("llama"))
    ids = torch.randint(3, 259, (1, 12), generator=torch.Generator().manual_seed(5))

    def work(team):
        entry = BlockInputs(bench.model, ids, 1, bench.device)
        inputs, target = bench.streams(entry, 2)
        inputs.states.fill_(1.0)
        target.states.zero_()
        entry._arguments = [[{}]]
        ones = {name: torch.ones((), requires_grad=True) for name in ("a", "b")}
        view = SimpleNamespace(parameters=ones, tensors=lambda: ones, constrain_=lambda: None)
        data = BlockData(0, entry, inputs, (target,), team=team)
        name = "ab"[team.rank]
        optimizer = torch.optim.SGD(ones.values(), 0.25)
        objective = Objective(torch.ones(1), False, "first")
        run = lambda tensors, states, arguments: states * tensors[name]  # noqa: E731
        fit.learning_step(view, run, data, 0, [optimizer], objective, "mse")
        return {name: float(values.detach()) for name, values in ones.items()}

    assert together(work) == [{"a": 0.75, "b": 0.75}] * SIZE, "half of the gradient 2 each"


@pytest.fixture
def model(make_model, make_bench, feed, tmp_path):
    """learn(samples, batch_size, team) -> records, and the folder of a whole model's run."""

    def learn(samples, batch_size, team, name):
        plan = Plan(Schemes(Scheme(3, 16, 16)), learned_by(lwc=True, let=True, rotation=True))
        bench = dataclasses.replace(make_bench(make_model("llama")), plan=plan)
        path = tmp_path / name
        folder = RunFolder(path)
        if team.rank == 0:
            folder = RunFolder.open(path) if path.exists() else create(path)
        learning = Learning(2, loss="mse", dynamic_weights=True, two_branch=True, keep_best=True)
        learning = dataclasses.replace(learning, batch_size=batch_size)
        seen = Seen()
        learn_model(bench, learning, samples, None, folder, seen, True, team=team)
        text = Samples(torch.cat([s["input_ids"] for s in samples.inputs]), "t", "", "", "", "")
        adapted = adapt(bench, learning, Adapting(1, 1), folder, text, Progress(), team=team)
        return seen.records, adapted

    return learn


def create(path):
    return RunFolder.create(path, Config(model="m", output_dir=str(path)), IDENTITY)


class Seen(Progress):
    def __init__(self):
        self.records = []

    def finished(self, block, record):
        self.records.append(record)


def test_a_whole_model_is_learned_together_and_kept_by_the_first(model, feed, tmp_path):
    samples = feed()

    def share(team):
        name = "run" if team.rank == 0 else "absent"
        return model(samples.only(SHARES[team.rank]), 1, team, name)

    expected, adapted = model(samples.only(ORDER), 2, ALONE, "alone")
    (records, own), (others, other) = together(share)
    assert records == others and own == other
    assert not (tmp_path / "absent").exists()
    folders = [RunFolder.open(tmp_path / name) for name in ("run", "alone")]
    for index, (record, alone) in enumerate(zip(records, expected, strict=True)):
        assert record.initial_loss == pytest.approx(alone.initial_loss, rel=1e-2)
        assert record.final_loss == pytest.approx(alone.final_loss, rel=1e-2)
        assert_close(*(folder.load_block(index) for folder in folders), 2e-2)
        assert folders[0].load_diagnostics(index) is not None
    (block,), (alone,) = own["blocks"], adapted["blocks"]
    assert block["final_loss"] == pytest.approx(alone["final_loss"], rel=1e-2)

    kept = folders[0].load_block(1)
    folders[0].block_path(1).unlink()
    (again, _), _ = together(share)
    assert again[0] is None and again[1].final_loss == pytest.approx(records[1].final_loss)
    assert_close(folders[0].load_block(1), kept, 1e-5)
    assert [each[1] for each in together(share)] == [own, own], "what was adapted is kept"


@pytest.mark.parametrize("rounding", [False, True])
def test_a_team_tunes_end_to_end(make_model, make_bench, feed, tmp_path, rounding):
    samples = feed()
    tuning = Tuning(tune=True, tune_lr=0.02, tune_epochs=2, tune_rounding=rounding)

    def work(team):
        plan = Plan(Schemes(Scheme(2, 16, 16)), (tuning,))
        bench = dataclasses.replace(make_bench(make_model("llama")), plan=plan)
        path = tmp_path / ("run" if team.rank == 0 else "absent")
        folder = RunFolder(path)
        if team.rank == 0:
            folder = RunFolder.open(path) if path.exists() else create(path)
        share = samples.only(SHARES[team.rank])
        learn_model(bench, Learning(0), share, None, folder, Progress(), False, team=team)

    together(work)
    assert not (tmp_path / "absent").exists()
    files = sorted((tmp_path / "run" / "tuned" / "model").iterdir())
    before = [path.read_bytes() for path in files]
    record = RunFolder.open(tmp_path / "run").stage("tuned").about(0)["record"]
    assert len(before) == 2 and record["best_epoch"] > 0
    together(work)
    assert [path.read_bytes() for path in files] == before, "kept"


def test_uneven_shares_are_refused_by_all_before_anything_is_learned(model, feed):
    samples = feed()
    shares = [0], [1, 2, 3]
    outcomes = together(lambda team: model(samples.only(shares[team.rank]), 1, team, "run"))
    assert all(isinstance(each, LRQuantError) for each in outcomes)
    assert {str(each).partition(";")[0] for each in outcomes} == {
        "the samples of one process are 3 batches, those of another 1"
    }


def test_members_statistics_are_those_of_all_samples():
    values = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
    whole, parts = ChannelStatistics(), [ChannelStatistics(), ChannelStatistics()]
    for name in "xy":
        whole.observe(name, values if name == "x" else values[3:])
        parts[1].observe(name, values[3:])
    parts[0].observe("x", values[:3])
    names = ["x", "y", "of nobody"]
    for merged in together(lambda team: parts[team.rank].merged(names, team.sum, team.maximum)):
        assert merged.samples == whole.samples
        for name in "xy":
            assert torch.equal(merged.maxima[name], whole.maxima[name])
            torch.testing.assert_close(merged.means[name], whole.means[name])
            torch.testing.assert_close(merged.squares[name], whole.squares[name])
        average = (3 * parts[0].midpoints["x"] + parts[1].midpoints["x"]) / 4
        torch.testing.assert_close(merged.midpoints["x"], average)
        assert torch.equal(merged.midpoints["y"], parts[1].midpoints["y"])
    alone = whole.merged(names, ALONE.sum, ALONE.maximum)
    for table in ("maxima", "midpoints", "means", "squares"):
        own, same = getattr(alone, table), getattr(whole, table)
        assert own.keys() == same.keys() and all(torch.equal(own[n], same[n]) for n in own)


def test_what_holds_for_all():
    assert together(lambda team: holds_for_all(team, True)) == [True] * SIZE
    assert together(lambda team: holds_for_all(team, team.rank == 0)) == [False] * SIZE


def test_alone_everything_is_as_it_is():
    values = torch.arange(3.0)
    assert ALONE.sum(values) is values and ALONE.maximum(values) is values
    assert ALONE.first(lambda: "x") == "x" and (ALONE.size, ALONE.rank) == (1, 0)
    assert holds_for_all(ALONE, True) and not holds_for_all(ALONE, False)
    require_even(ALONE, 3)
