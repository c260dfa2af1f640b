"""The start of learning: which of several strengths is taken."""

from __future__ import annotations

import math

import pytest
import torch

from lrquant.blocks.inputs import BlockInputs
from lrquant.blocks.plan import Plan, learned_by
from lrquant.blocks.workbench import advance_full_precision
from lrquant.config.scheme import Scheme
from lrquant.config.schemes import Schemes
from lrquant.ingredients.base.statistics import ChannelStatistics
from lrquant.ingredients.equivalent import STRENGTHS, Equivalent
from lrquant.learn.block_data import BlockData
from lrquant.learn.starting import TRIED_STEPS, begin_at_best, strengths_of

KIND = "mse+nlc"


@pytest.fixture
def block(make_model, make_bench, token_ids):
    """Block 0 of a tiny model, one channel of whose inputs is large, before it has a start."""

    def make(scheme, batches=TRIED_STEPS, **learned):
        plan = Plan(Schemes(scheme), learned_by(lwc=True, let=True, **learned))
        bench = make_bench(make_model("llama"), plan=plan)
        entry = BlockInputs(bench.model, token_ids(batches, 12), 1, bench.device)
        inputs, target = bench.streams(entry, 2)
        entry.embed(inputs)
        for batch in entry.batches:
            states = inputs.read(batch)
            states[..., 3] *= 30
            inputs.write(batch, states)
        statistics, stored = ChannelStatistics(), bench.stored(0)
        advance_full_precision(bench, 0, stored, entry, inputs, target, statistics.observe)
        view = bench.view(0, stored)
        data = BlockData(0, entry, inputs, (target,))
        return view, bench.runner(0, view), data, statistics

    return make


def chosen(view, runner, data, statistics, strengths=STRENGTHS):
    """The strength that is taken, and what starts have been made."""
    tried = []

    def begin(strength):
        tried.append(strength)
        view.initialize(statistics, (), strength)

    with runner:
        return begin_at_best(view, runner, data, KIND, strengths, begin), tried


def losses(view, runner, data, statistics):
    """The loss of each strength over the whole set, its terms by their share of the first's."""
    terms = {}
    with runner, torch.no_grad():
        for strength in STRENGTHS:
            view.initialize(statistics, (), strength)
            terms[strength] = data.terms(runner, view.tensors(), KIND)
    return {each: float((own / terms[STRENGTHS[0]]).sum()) for each, own in terms.items()}


@pytest.mark.parametrize("scheme", [Scheme(3, 4), Scheme(3, 8), Scheme(4, 16)], ids=str)
def test_the_strength_with_the_least_loss_is_taken(block, scheme):
    view, *rest = block(scheme)
    best, tried = chosen(view, *rest)
    own = losses(view, *rest)
    assert best == min(own, key=own.__getitem__) and tried == list(STRENGTHS)


def test_the_view_is_left_at_the_strength_that_is_taken(block):
    view, runner, data, statistics = block(Scheme(3, 8))
    best, _ = chosen(view, runner, data, statistics)
    left = view.parameters
    view.initialize(statistics, (), best)
    assert left.keys() == view.parameters.keys()
    assert all(torch.equal(left[name], values) for name, values in view.parameters.items())


def test_eight_bit_activations_ask_for_less_than_four(block):
    """Of weights at 3 bits, what is given to activations at 8 bits is lost."""
    few, many = (chosen(*block(Scheme(3, bits)))[0] for bits in (3, 8))
    assert many <= few and many < 1


def test_only_the_samples_of_a_few_steps_are_tried(block, monkeypatch):
    view, runner, data, statistics = block(Scheme(3, 8), batches=TRIED_STEPS + 2)
    seen = []
    fed = data.fed
    object.__setattr__(data, "fed", lambda *rest: seen.append(rest[0]) or fed(*rest))
    chosen(view, runner, data, statistics, STRENGTHS[:2])
    assert seen == 2 * list(range(TRIED_STEPS))


def test_a_start_that_is_not_finite_is_not_taken(block):
    view, runner, data, statistics = block(Scheme(3, 8))

    def begin(strength):
        view.initialize(statistics)
        if strength != 0.5:
            name = next(each for each in view.parameters if each.startswith("let."))
            view.parameters[name] = view.parameters[name] * math.nan

    with runner:
        assert begin_at_best(view, runner, data, KIND, (0.5, 0.0, 1.0), begin) == 0.5
        assert begin_at_best(view, runner, data, KIND, (0.0, 0.5, 1.0), begin) == 0.5
        assert begin_at_best(view, runner, data, KIND, (0.0, 1.0), begin) == 0.0, "none is better"


def test_a_strength_that_is_given_is_taken_untried(block):
    given = Equivalent(let=True, let_init=0.5)
    assert strengths_of([given]) == () and strengths_of([Equivalent(let=True)]) == STRENGTHS
    view, _, _, statistics = block(Scheme(3, 8), let_init=0.5)
    view.initialize(statistics)
    parameters = view.parameters
    tried, _, _, statistics = block(Scheme(3, 8))
    tried.initialize(statistics, (), 0.5)
    assert all(torch.equal(parameters[name], each) for name, each in tried.parameters.items())
