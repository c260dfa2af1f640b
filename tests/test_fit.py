"""Learning one block: what the optimizer does, and what happens when a loss is not finite."""

from __future__ import annotations

import math

import pytest
import torch

from lrquant import fit
from lrquant.blocks import BlockInputs
from lrquant.errors import LRQuantError
from lrquant.fit import BlockData, FitSettings, fit_block, reconstruction_loss
from lrquant.learn.equivalent import SMALLEST_LEARNED_SCALE
from lrquant.learn.view import Method
from lrquant.numerics.losses import mean_squared_error, negative_log_cosine
from lrquant.scheme import Scheme
from lrquant.stats import ChannelStatistics
from lrquant.workbench import advance_full_precision

BATCHES = 4
W2A8 = Scheme(2, 8)


@pytest.fixture
def block(make_model, make_bench, token_ids):
    """A function that makes block 0 of a tiny model ready to be learned."""

    def make(model=None, scheme=W2A8, batch_size=1, method=None):
        bench = make_bench(model or make_model("llama"))
        entry = BlockInputs(bench.model, token_ids(BATCHES, 12), batch_size, bench.device)
        inputs, targets = bench.streams(entry, 2)
        entry.embed(inputs)
        targets.copy(inputs)
        statistics = ChannelStatistics()
        stored = bench.stored(0)
        advance_full_precision(bench, 0, stored, entry, targets, statistics.observe)
        view = bench.view(0, stored, scheme, method or Method(lwc=True, let=True))
        view.initialize(statistics, bench.model.block_name(0))
        return view, bench.runner(0, view), BlockData(0, entry, inputs, targets)

    return make


def settings(**changes):
    defaults = {"epochs": 3, "let_lr": 5e-3, "lwc_lr": 1e-2, "weight_decay": 0.0, "loss": "mse+nlc"}
    return FitSettings(**(defaults | changes))


def learn(prepared, **changes):
    """The report, and the loss over all samples before and after."""
    view, runner, data = prepared
    kind = changes.get("loss", "mse+nlc")
    with runner, torch.no_grad():
        before = data.loss(runner, view.tensors(), kind)
    with runner:
        report = fit_block(view, runner, data, settings(**changes))
    with runner, torch.no_grad():
        return report, before, data.loss(runner, view.tensors(), kind)


def copies(view):
    return {name: tensor.clone() for name, tensor in view.parameters.items()}


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def test_loss_is_the_sum_of_its_parts():
    output, target = torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    mse, nlc = mean_squared_error(output, target), negative_log_cosine(output, target)
    assert reconstruction_loss(output, target, "mse") == mse
    assert reconstruction_loss(output, target, "nlc") == nlc
    assert reconstruction_loss(output, target, "mse+nlc") == mse + nlc


@pytest.mark.parametrize("loss", ["mse", "nlc", "mse+nlc"])
def test_learning_lowers_the_loss(block, loss):
    report, before, after = learn(block(), epochs=20, loss=loss)
    assert report.initial_loss == before
    assert after < 0.9 * before
    assert len(report.epoch_losses) == 20 and report.non_finite == []
    assert report.epoch_losses[-1] < report.epoch_losses[0]


def test_every_parameter_is_learned_and_none_needs_gradients_after(block):
    view, *_ = prepared = block()
    before = copies(view)
    learn(prepared)
    assert {name.split(".")[0] for name in before} == {"lwc", "let"}
    assert not any(torch.equal(before[name], view.parameters[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in view.parameters.values())


def test_each_kind_has_its_learning_rate(block):
    for still, moving, rates in (
        ("lwc.", "let.", {"lwc_lr": 0.0}),
        ("let.", "lwc.", {"let_lr": 0.0}),
    ):
        view, *_ = prepared = block()
        before = copies(view)
        learn(prepared, **rates)
        changed = {n for n in before if not torch.equal(before[n], view.parameters[n])}
        assert changed and all(name.startswith(moving) for name in changed), still


def test_the_first_adam_step_is_the_learning_rate(block):
    view, runner, data = block(method=Method(lwc=True))
    before = copies(view)
    optimizer = fit.make_optimizer(view.parameters, settings(lwc_lr=0.125))
    with runner:
        fit.learning_step(view, runner, data, 0, optimizer, "mse")
    steps = [(view.parameters[n].detach() - before[n]).abs() for n in before]
    largest = max(float(step.max()) for step in steps)
    assert largest == pytest.approx(0.125, rel=1e-2)


def test_weight_decay_shrinks_parameters(block):
    sizes = []
    for decay in (0.0, 5.0):
        view, *_ = prepared = block(method=Method(lwc=True))
        learn(prepared, weight_decay=decay)
        sizes.append(sum(float(p.abs().sum()) for p in view.parameters.values()))
    assert sizes[1] < 0.95 * sizes[0]


def test_scales_stay_positive(block):
    view, *_ = prepared = block()
    learn(prepared, let_lr=2.0, epochs=2)
    scales = [p for name, p in view.parameters.items() if name.endswith(".scale")]
    smallest = min(float(scale.min()) for scale in scales)
    assert smallest >= SMALLEST_LEARNED_SCALE * 0.999


def test_nothing_to_learn(block):
    view, *_ = prepared = block()
    before = copies(view)
    report, initial, after = learn(prepared, epochs=0)
    assert equal(before, view.parameters) and initial == after == report.initial_loss
    report, initial, after = learn(block(method=Method()), epochs=5)
    assert report.epoch_losses == [] and initial == after


def test_larger_batches_have_the_same_loss_and_fewer_steps(block):
    steps = []
    for batch_size in (1, 3):
        view, runner, data = block(batch_size=batch_size)
        seen = []
        with runner:
            report = fit_block(
                view, runner, data, settings(), lambda step, loss, seen=seen: seen.append(step)
            )
        steps.append((seen, report.initial_loss))
    (ones, loss_one), (threes, loss_three) = steps
    assert ones == list(range(1, 3 * BATCHES + 1)) and threes == list(range(1, 3 * 2 + 1))
    assert loss_three == pytest.approx(loss_one, rel=0.05)


def failing_from(monkeypatch, call):
    """Make the loss NaN from the given call on, as long as gradients are recorded."""
    calls = []
    original = fit.reconstruction_loss

    def loss(output, target, kind):
        value = original(output, target, kind)
        if not torch.is_grad_enabled():
            return value
        calls.append(value)
        return value * math.nan if len(calls) >= call else value

    monkeypatch.setattr(fit, "reconstruction_loss", loss)


def test_not_finite_in_the_first_epoch_goes_back_to_the_start(block, monkeypatch):
    view, *_ = prepared = block()
    before = copies(view)
    failing_from(monkeypatch, 3)
    report, initial, after = learn(prepared)
    assert report.non_finite == ["epoch 1: back to the best parameters so far"]
    assert report.epoch_losses == [] and equal(before, view.parameters) and after == initial


def test_not_finite_later_goes_back_to_the_best_epoch(block, monkeypatch):
    view, *_ = undisturbed = block()
    learn(undisturbed, epochs=5)
    lowest = copies(view)
    view, *_ = disturbed = block()
    failing_from(monkeypatch, 5 * BATCHES + 2)
    report, before, after = learn(disturbed, epochs=8)
    assert report.non_finite == ["epoch 6: back to the best parameters so far"]
    assert len(report.epoch_losses) == 5
    assert report.epoch_losses[-1] == min(report.epoch_losses), "or this test compares nothing"
    assert equal(lowest, view.parameters) and after < before
    assert not any(parameter.requires_grad for parameter in view.parameters.values())


@pytest.mark.parametrize("epochs", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, BATCHES])
def test_a_step_too_far_is_taken_back(block, monkeypatch, epochs, batch_size):
    """Also where it is the last of an epoch, or of all."""
    view, *_ = prepared = block(batch_size=batch_size)
    start = copies(view)
    original = fit.reconstruction_loss

    def loss(output, target, kind):
        value = original(output, target, kind)
        far = any((view.parameters[n].detach() - start[n]).abs().max() > 0.5 for n in start)
        return value * math.nan if far else value

    monkeypatch.setattr(fit, "reconstruction_loss", loss)
    report, before, after = learn(prepared, epochs=epochs, let_lr=1.0, lwc_lr=1.0)
    assert len(report.non_finite) == 1 and "back to the best" in report.non_finite[0]
    assert equal(start, view.parameters) and after == before


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("batch_size", [1, BATCHES])
def test_steps_into_infinity_end_at_finite_parameters(block, epochs, batch_size):
    view, *_ = prepared = block(batch_size=batch_size)
    report, before, after = learn(prepared, epochs=epochs, let_lr=1e30, lwc_lr=1e30)
    assert math.isfinite(after) and (after <= before or not report.non_finite)
    assert all(torch.isfinite(p).all() for p in view.parameters.values())


def test_gradients_that_are_not_finite(block, monkeypatch):
    view, *_ = prepared = block()
    before = copies(view)
    original = fit.reconstruction_loss

    def loss(output, target, kind):
        value = original(output, target, kind)
        return value + 0 * (output - output.detach()).sum().sqrt()  # finite, its gradient is not

    monkeypatch.setattr(fit, "reconstruction_loss", loss)
    report, _, after = learn(prepared)
    assert report.non_finite and equal(before, view.parameters) and math.isfinite(after)


@pytest.mark.parametrize(
    "name", ["self_attn.q_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight"]
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_named(block, make_model, name, value):
    model = make_model("llama")
    model.get_parameter(f"model.layers.0.{name}").view(-1)[5] = value
    with pytest.raises(LRQuantError) as error:
        learn(block(model, method=Method(lwc=True)))
    assert "block 0" in str(error.value) and name in str(error.value)


def test_an_input_that_is_not_finite_is_named(block):
    *_, data = prepared = block(method=Method(lwc=True))
    data.inputs.states[2, 3] = math.nan
    with pytest.raises(LRQuantError, match=r"block 0: the input of self_attn\.q_proj"):
        learn(prepared)


def test_a_target_that_is_not_finite_is_no_linear_s_fault(block):
    *_, data = prepared = block()
    data.targets.states[1] = math.nan
    with pytest.raises(LRQuantError, match="block 0: the block's output"):
        learn(prepared)
