"""A team: members with a share of the samples each learn, to the byte, what one with all does."""

from __future__ import annotations

import copy
import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from lrquant.blocks.plan import Plan, learned_by
from lrquant.blocks.workbench import advance_full_precision
from lrquant.config.config import Config
from lrquant.config.groups import Adapting, Learning
from lrquant.config.scheme import Scheme
from lrquant.config.schemes import Schemes
from lrquant.data.feeds import Feed
from lrquant.data.samples import Samples
from lrquant.errors import LRQuantError
from lrquant.ingredients.base.statistics import ChannelStatistics, ShareOfStatistics
from lrquant.ingredients.tuning import Tuning
from lrquant.learn import block_data, fit
from lrquant.learn.adaptation import adapt
from lrquant.learn.block_data import BlockData
from lrquant.learn.fit import fit_block, require_same
from lrquant.learn.model import learn_model
from lrquant.learn.objective import Objective
from lrquant.learn.share import Share, require_steps, share_of, shared_inputs
from lrquant.measures.agreement import MEASURE as AGREEMENT
from lrquant.measures.evaluation.evaluation import score_text
from lrquant.measures.perplexity import MEASURE as PERPLEXITY
from lrquant.measures.subjects import subject
from lrquant.measures.subjects.subject import RunSubject
from lrquant.runs.folder import RunFolder
from lrquant.runs.progress import Progress
from lrquant.team.team import ALONE, Team, holds_for_all, sum_in_order

IDENTITY = {"model": "m", "scheme": "s", "learning": {}, "data": {}, "precision": "float32"}


class Threads(Team):
    """Members of one process that wait for each other."""

    def __init__(self, rank: int, shared: list, barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, len(shared)
        self._shared, self._barrier = shared, barrier

    def each(self, value):
        self._shared[self.rank] = copy.deepcopy(value)
        self._barrier.wait()
        values = list(self._shared)
        self._barrier.wait()
        return values

    def first(self, make):
        value = make() if self.rank == 0 else None
        theirs = copy.deepcopy(self.each(value)[0])
        return value if self.rank == 0 else theirs

    def ordered_sum(self, rows, counts):
        members = self.each(rows)
        assert [len(each) for each in members] == list(counts)
        return sum_in_order(torch.cat(members))


def together(work, size=2):
    """What `work(team)` gives for each member, or refuses; no member waits for one that failed."""
    shared, barrier = [None] * size, threading.Barrier(size, timeout=60)

    def member(rank: int):
        try:
            return work(Threads(rank, shared, barrier))
        except LRQuantError as error:
            return error
        except Exception:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        members = [pool.submit(member, rank) for rank in range(size)]
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
    """learned(feed, batch_size, team, together) -> the report and parameters of block 0."""

    def learn(feed, batch_size, team, together=1, **settings):
        plan = Plan(Schemes(Scheme(3, 16, 16)), learned_by(lwc=True, let=True, lwc_init=4.0))
        bench = dataclasses.replace(make_bench(make_model("llama")), plan=plan)
        entry, share = shared_inputs(bench, feed, batch_size, together, team)
        inputs, target = bench.streams(entry, 2)
        entry.embed(inputs)
        statistics, stored = ChannelStatistics(), bench.stored(0)
        advance_full_precision(bench, 0, stored, entry, inputs, target)
        view = bench.view(0, stored)
        widths = {f"{view.plan.name}.{name}": s.columns for name, s in view.shapes.matrices.items()}
        statistics.maxima = {name: torch.ones(width) for name, width in widths.items()}
        view.initialize(statistics)
        data = BlockData(0, entry, inputs, (target,), share=share)
        with bench.runner(0, view) as runner:
            report = fit_block(view, runner, data, Learning(3, **settings))
        return report, view.parameters

    return learn


def same(parameters, expected):
    assert parameters.keys() == expected.keys()
    return all(torch.equal(parameters[name], values) for name, values in expected.items())


REPORTED = "initial_loss", "epoch_losses", "held_losses", "best_epoch", "non_finite"


def reported(report):
    return [getattr(report, name) for name in REPORTED]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("size", "batch_size", "at_once"), [(2, 4, 1), (3, 3, 1), (2, 4, 2)])
@pytest.mark.parametrize(
    ("loss", "dynamic", "ema_init", "keep_best"),
    [("mse", False, "first", True), ("mse+nlc", True, "one", False)],
)
def test_members_learn_the_bytes_that_one_does(
    learned, feed, loss, dynamic, ema_init, keep_best, weighted, size, batch_size, at_once
):
    """Also where the last step has fewer samples than there are members."""
    settings = {"loss": loss, "dynamic_weights": dynamic, "ema_init": ema_init}
    settings |= {"keep_best": keep_best, "together": at_once}
    report, expected = learned(feed(weighted), batch_size, ALONE, **settings)
    outcomes = together(lambda team: learned(feed(weighted), batch_size, team, **settings), size)
    for other, parameters in outcomes:
        assert reported(other) == reported(report)
        assert same(parameters, expected)


def test_a_larger_batch_learns_something_else(learned, feed):
    """The negative control of the test above, and of samples that go through a block at once."""
    _, one = learned(feed(), 1, ALONE)
    _, two = learned(feed(), 2, ALONE)
    _, at_once = learned(feed(), 2, ALONE, together=2)
    assert not same(one, two) and not same(two, at_once)
    for name, values in two.items():
        torch.testing.assert_close(at_once[name], values, rtol=1e-2, atol=1e-2)


def test_a_member_whose_loss_is_not_finite_takes_all_back(learned, feed, monkeypatch):
    original, here = block_data.loss_terms, threading.local()

    def loss(output, targets, kind, weights=None, *, compiled=False):
        terms = original(output, targets, kind, weights)
        return terms * float("nan") if here.fails and torch.is_grad_enabled() else terms

    def work(team):
        here.fails = team.rank == 1
        return learned(feed(), 2, team)

    monkeypatch.setattr(block_data, "loss_terms", loss)
    (first, one), (second, other) = together(work)
    assert first.non_finite == second.non_finite == ["epoch 1: back to the best parameters so far"]
    assert same(one, other)


def test_a_parameter_that_one_member_s_samples_reach_is_the_same_for_all(make_model, make_bench):
    """As an expert's: nobody waits for a gradient that another does not have; "c" has none."""
    bench = make_bench(make_model("llama"))
    ids = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(5))

    def work(team):
        entry, share = shared_inputs(bench, Feed.of_tokens(ids), 2, 1, team)
        inputs, target = bench.streams(entry, 2)
        inputs.states.fill_(1.0)
        target.states.zero_()
        entry._arguments = [[{}]] * 2
        ones = {name: torch.ones((), requires_grad=True) for name in ("a", "b", "c")}
        view = SimpleNamespace(
            by_expert=False, moving=ones, tensors=lambda: ones, constrain_=lambda: None
        )
        data = BlockData(0, entry, inputs, (target,), share=share)
        names = iter("ab" if team.size == 1 else "ab"[team.rank])
        optimizer = torch.optim.AdamW(ones.values(), 0.25, weight_decay=0.5)
        objective = Objective(torch.ones(1), False, "first")

        def run(tensors, states, arguments):
            return states * tensors[next(names)]

        run.compiled = False
        fit.learning_step(view, run, data, 0, [optimizer], objective, "mse")
        return {name: float(values.detach()) for name, values in ones.items()}

    alone = work(ALONE)
    assert together(work) == [alone, alone]
    assert alone["a"] == alone["b"] < alone["c"] == 1, "without a gradient nothing decays either"


def test_members_that_have_learned_different_parameters_stop(feed):
    def work(team):
        require_same(team, {"a": torch.ones(2, dtype=torch.bfloat16)}, 0)
        require_same(team, {"a": torch.full((2,), float(team.rank))}, 7)

    errors = together(work)
    assert all(str(each).startswith("block 7: the processes learned different") for each in errors)


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
        text = Samples(torch.cat([s["input_ids"] for s in samples.inputs]), "t", "", "", "")
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
    """Also one that is gone on with by another number of processes."""
    samples = feed()

    def share(team):
        return model(samples, 4, team, "run" if team.rank == 0 else "absent")

    expected, adapted = model(samples, 4, ALONE, "alone")
    (records, own), (others, other) = together(share)
    assert records == others and own == other == adapted
    assert not (tmp_path / "absent").exists()
    folders = [RunFolder.open(tmp_path / name) for name in ("run", "alone")]
    for index, (record, alone) in enumerate(zip(records, expected, strict=True)):
        assert figures_of(record) == figures_of(alone)
        assert same(*(folder.load_block(index) for folder in folders))
        assert folders[0].load_diagnostics(index) is not None

    folders[0].block_path(1).unlink()
    (again, _), *_ = together(share, size=4)
    assert again[0] is None and figures_of(again[1]) == figures_of(expected[1])
    assert same(*(folder.load_block(1) for folder in folders))
    assert [each[1] for each in together(share)] == [own, own], "what was adapted is kept"


def figures_of(record):
    """What does not depend on the machine."""
    return dataclasses.replace(record, seconds=0, peak_memory_bytes=0)


@pytest.mark.parametrize("rounding", [False, True])
def test_a_team_tunes_end_to_end(make_model, make_bench, token_ids, tmp_path, rounding):
    samples = Feed.of_tokens(token_ids(10, 12))
    tuning = Tuning(tune=True, tune_lr=0.02, tune_epochs=2, tune_rounding=rounding)

    def tuned(team, name):
        plan = Plan(Schemes(Scheme(2, 16, 16)), (tuning,))
        bench = dataclasses.replace(make_bench(make_model("llama")), plan=plan)
        path = tmp_path / (name if team.rank == 0 else "absent")
        folder = RunFolder(path)
        if team.rank == 0:
            folder = RunFolder.open(path) if path.exists() else create(path)
        learning = Learning(0, batch_size=3)
        learn_model(bench, learning, samples, None, folder, Progress(), False, team=team)

    def kept(name):
        record = RunFolder.open(tmp_path / name).stage("tuned").about(0)["record"]
        files = sorted((tmp_path / name / "tuned" / "model").iterdir())
        return record, [path.read_bytes() for path in files]

    tuned(ALONE, "alone")
    together(lambda team: tuned(team, "run"))
    assert not (tmp_path / "absent").exists()
    before = kept("run")
    assert before == kept("alone") and before[0]["best_epoch"] > 0 and len(before[1]) == 2
    together(lambda team: tuned(team, "run"))
    assert kept("run") == before


def test_too_few_samples_are_refused_by_all_before_anything_is_learned(model, feed):
    for batch_size, size in ((1, 2), (4, 5)):
        outcomes = together(lambda team, b=batch_size: model(feed(), b, team, "run"), size)
        assert {str(each) for each in outcomes} == {
            f"4 samples in steps of {batch_size}, 1 at once, are too few for {size} processes; "
            "start fewer, or use a larger --batch_size and more samples"
        }


@pytest.mark.parametrize(("at_once", "words"), [(1, ""), (2, " and --micro_batch_size 2")])
def test_steps_of_fewer_samples_than_processes_are_refused(at_once, words):
    together(lambda team: require_steps(3 * at_once, at_once, team.size), 3)
    (error, *_) = together(lambda team: require_steps(2 * at_once, at_once, team.size), 3)
    assert str(error) == (
        f"--batch_size {2 * at_once}{words}: too few samples a step for 3 processes; use "
        f"--batch_size {3 * at_once} or a multiple of it"
    )


@pytest.mark.parametrize("windows", [1, 2, 7])
def test_windows_are_measured_in_shares(make_model, make_bench, token_ids, monkeypatch, windows):
    """Two at once go through a block; a member for which there are none says nothing of them."""
    monkeypatch.setattr(subject, "EVALUATION_TOKENS", 24)
    text = Samples(token_ids(windows, 12), "text", "", "", "")

    def scores(team):
        bench = make_bench(make_model("llama"), plan=Plan(Schemes(Scheme(3, 8, 16)), ()))
        own = RunSubject("quantized", bench, team=team)
        columns = [("full_precision", own), ("round_to_nearest", own)]
        measures = [PERPLEXITY, AGREEMENT]
        scored = score_text(measures, columns, text, Progress(), held=True, team=team)
        return [dict(each.scores) for each in scored]

    expected = scores(ALONE)
    assert expected[0]["full_precision"] != expected[0]["round_to_nearest"]
    for size in (2, 3):
        assert together(scores, size) == [expected] * size


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize(("batch_size", "at_once"), [(4, 1), (8, 1), (8, 2), (7, 1)])
def test_shares_are_all_samples_in_order(token_ids, size, batch_size, at_once):
    feed = Feed.of_tokens(token_ids(11, 4))

    def work(team):
        own, share = share_of(feed, batch_size, at_once, team)
        ids = [sample["input_ids"] for sample in own.inputs]
        batches = [ids[each] for each in own.slices(at_once)]
        assert sum(map(len, share.steps)) == len(batches)
        return share.in_order(batches)

    for ordered in together(work, size):
        samples = [ids for batch in ordered for ids in batch]
        assert torch.equal(torch.cat(samples), token_ids(11, 4))


def test_members_statistics_are_those_of_all_samples():
    values = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
    whole = ChannelStatistics()
    for batch in values:
        whole.observe("x", batch[None])
        whole.observe("y", 2 * batch)

    def work(team):
        share = Share(team, [[1, 1], [1, 1]], [])
        seen = ShareOfStatistics()
        for batch in values[team.rank :: 2]:
            seen.observe("x", batch[None])
            seen.observe("y", 2 * batch)
        return seen.whole(share.in_order)

    for merged in [*together(work), whole.whole(lambda batches: batches)]:
        assert merged.samples == whole.samples
        for table in ("maxima", "midpoints", "means", "squares"):
            own, expected = getattr(merged, table), getattr(whole, table)
            assert same(own, expected)


def test_what_holds_for_all():
    assert together(lambda team: holds_for_all(team, True)) == [True] * 2
    assert together(lambda team: holds_for_all(team, team.rank == 0)) == [False] * 2


def test_alone_everything_is_as_it_is():
    assert ALONE.each(3) == [3] and ALONE.first(lambda: "x") == "x"
    assert (ALONE.size, ALONE.rank) == (1, 0)
    assert holds_for_all(ALONE, True) and not holds_for_all(ALONE, False)
    rows = torch.tensor([[1e8], [1.0], [-1e8]])
    assert ALONE.ordered_sum(rows, [3]).tolist() == [0], "in order, in float32"
