"""Learning one block: what the optimizer does, and what happens when a loss is not finite."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from lrquant.config.groups import Learning
from lrquant.config.scheme import Scheme
from lrquant.errors import LRQuantError
from lrquant.ingredients.ingredient import SMALLEST_FACTOR
from lrquant.learn import block_data, fit
from lrquant.learn.fit import fit_block
from lrquant.learn.objective import Objective

BATCHES = 4


def settings(**changes):
    return Learning(**({"epochs": 3} | changes))


def learn(prepared, **changes):
    """The report, and the loss over all samples before and after."""
    view, runner, data = prepared
    kind = changes.get("loss", "mse+nlc")
    with runner, torch.no_grad():
        before = float(data.terms(runner, view.tensors(), kind).sum())
    with runner:
        report = fit_block(view, runner, data, settings(**changes))
    with runner, torch.no_grad():
        return report, before, float(data.terms(runner, view.tensors(), kind).sum())


def copies(view):
    return {name: tensor.clone() for name, tensor in view.parameters.items()}


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


@pytest.mark.parametrize("loss", ["mse", "nlc", "mse+nlc"])
def test_learning_lowers_the_loss(block, loss):
    report, before, after = learn(block(), epochs=20, loss=loss)
    assert report.initial_loss == before
    assert after < 0.9 * before
    assert len(report.epoch_losses) == 20 and report.non_finite == []
    assert report.epoch_losses[-1] < report.epoch_losses[0]


def test_the_best_epoch_by_the_loss_held_still_is_kept(block):
    """A learning rate that overshoots: the last epoch is far from the best."""
    rates = {"lwc": True, "let": True, "let_lr": 0.3, "lwc_lr": 3.0}
    report, _, last = learn(block(**rates), epochs=6)
    assert report.best_epoch is None and report.held_losses == []
    view, *_ = prepared = block(**rates)
    report, before, after = learn(prepared, keep_best=True, epochs=6)
    assert len(report.held_losses) == 6
    assert report.held_losses[-1] == pytest.approx(last, rel=1e-6), "the same steps"
    choices = [before, *report.held_losses]
    assert after == min(choices) < last and report.best_epoch == choices.index(min(choices))
    assert not any(parameter.requires_grad for parameter in view.parameters.values())


def test_a_few_samples_say_which_epoch_is_best(block, monkeypatch):
    """The rates overshoot; what is kept is the best by the samples of the first two steps."""
    monkeypatch.setattr(fit, "HELD_SAMPLES", 2)
    rates = {"lwc": True, "let": True, "let_lr": 0.3, "lwc_lr": 3.0}
    view, runner, data = prepared = block(**rates)

    def over(steps):
        with runner, torch.no_grad():
            return float(data.terms(runner, view.tensors(), "mse+nlc", steps=steps).sum())

    start, whole = over(2), over(None)
    report, before, _ = learn(prepared, keep_best=True, epochs=6)
    assert report.initial_loss == before == whole != start
    choices = [start, *report.held_losses]
    assert len(choices) == 7 and over(2) == min(choices)
    assert report.best_epoch == choices.index(min(choices))


@pytest.mark.parametrize(
    "steps, batch_size, expected",
    [(128, 1, 32), (32, 1, None), (16, 8, 4), (4, 8, None), (1, 64, None)],
)
def test_how_many_steps_say_which_epoch_is_best(steps, batch_size, expected):
    assert fit.held_steps(steps, batch_size) == expected


def test_the_start_is_kept_where_no_epoch_is_better(block):
    view, *_ = prepared = block(lwc=True, let=True, let_lr=50.0, lwc_lr=50.0)
    before = copies(view)
    report, initial, after = learn(prepared, keep_best=True)
    assert report.best_epoch == 0 and equal(before, view.parameters) and after == initial


def test_the_best_epoch_is_the_last_where_every_epoch_is_better(block):
    slow = {"rotation": True, "rotation_lr": 1e-3}
    plain, kept = (block(scheme=Scheme(3), **slow) for _ in range(2))
    learn(plain, epochs=3)
    report, *_ = learn(kept, keep_best=True, epochs=3)
    assert report.best_epoch == 3 and equal(plain[0].parameters, kept[0].parameters)


def test_both_branches_are_in_the_loss(block):
    view, runner, data = block(branches=2)
    with runner, torch.no_grad():
        both = data.terms(runner, view.tensors(), "mse+nlc")
        one = dataclasses.replace(data, targets=data.targets[:1])
        assert torch.allclose(both, 2 * one.terms(runner, view.tensors(), "mse+nlc"))
        data.targets[1].states.mul_(1.5)
        assert (data.terms(runner, view.tensors(), "mse+nlc")[0] > both[0]).all()


@pytest.mark.parametrize("ema_init", ["first", "one"])
def test_learning_with_dynamic_weights(block, ema_init):
    prepared = block(branches=2, lwc=True, let=True, rotation=True)
    settings = {"dynamic_weights": True, "two_branch": True, "ema_init": ema_init}
    report, before, after = learn(prepared, epochs=20, **settings)
    assert report.initial_loss == pytest.approx(2, rel=1e-2), "both terms at their own start"
    assert report.epoch_losses[-1] < 0.9 * report.initial_loss and after < before


def test_a_factor_of_zero_loss_does_not_divide_by_zero(block):
    """A block without any error: 8 bits of an already exact weight."""
    view, runner, data = block(scheme=Scheme(8), rotation=True)
    with runner, torch.no_grad():
        data.targets[0].copy(data.inputs)
        exact = {**view.tensors()}
        for batch, samples in enumerate(data.entry.batches):
            arguments = data.entry.arguments(batch, 0)
            data.targets[0].write(samples, runner(exact, data.inputs.read(samples), arguments))
    report, *_ = learn((view, runner, data), dynamic_weights=True, epochs=2, keep_best=True)
    assert math.isfinite(report.initial_loss) and report.non_finite == []


@pytest.mark.parametrize(
    ("sharing", "rank"), [("site", 1), ("linear", 1), ("none", 1), ("weight", 1), ("weight", 3)]
)
def test_every_parameter_is_learned_and_none_needs_gradients_after(block, sharing, rank):
    factors = {"rotation": True, "rotation_sharing": sharing, "rotate_rank": rank}
    view, *_ = prepared = block(lwc=True, let=True, **factors)
    before = copies(view)
    learn(prepared)
    assert {name.split(".")[0] for name in before} == {"lwc", "let", "rotation"}
    assert not any(torch.equal(before[name], view.parameters[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in view.parameters.values())


def test_each_kind_has_its_learning_rate(block):
    for moving in ("lwc", "let", "rotation"):
        still = {f"{kind}_lr": 0.0 for kind in ("lwc", "let", "rotation") if kind != moving}
        view, *_ = prepared = block(lwc=True, let=True, rotation=True, **still)
        before = copies(view)
        learn(prepared)
        changed = {n for n in before if not torch.equal(before[n], view.parameters[n])}
        assert changed and all(name.startswith(moving + ".") for name in changed), moving


def test_the_first_adam_step_is_the_learning_rate(block):
    view, runner, data = block(lwc=True, lwc_lr=0.125)
    before = copies(view)
    optimizers = fit.make_optimizers(view, 0.0, 1)
    with runner:
        objective = Objective(torch.ones(1), False, "first")
        fit.learning_step(view, runner, data, 0, optimizers, objective, "mse")
    steps = [(view.parameters[n].detach() - before[n]).abs() for n in before]
    largest = max(float(step.max()) for step in steps)
    assert largest == pytest.approx(0.125, rel=1e-2)


def test_weight_decay_shrinks_parameters(block):
    sizes = []
    for decay in (0.0, 5.0):
        view, *_ = prepared = block(lwc=True)
        learn(prepared, weight_decay=decay)
        sizes.append(sum(float(p.abs().sum()) for p in view.parameters.values()))
    assert sizes[1] < 0.95 * sizes[0]


def test_scales_stay_positive(block):
    view, *_ = prepared = block(lwc=True, let=True, let_lr=2.0)
    learn(prepared, epochs=2)
    scales = [p for name, p in view.parameters.items() if name.endswith(".scale")]
    smallest = min(float(scale.min()) for scale in scales)
    assert smallest >= SMALLEST_FACTOR * 0.999


def test_nothing_to_learn(block):
    view, *_ = prepared = block()
    before = copies(view)
    report, initial, after = learn(prepared, epochs=0)
    assert equal(before, view.parameters) and initial == after == report.initial_loss
    report, initial, after = learn(block(lwc=False), epochs=5)
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
    original = block_data.loss_terms

    def loss(output, targets, kind, weights=None, *, compiled=False):
        value = original(output, targets, kind)
        if not torch.is_grad_enabled():
            return value
        calls.append(value)
        return value * math.nan if len(calls) >= call else value

    monkeypatch.setattr(block_data, "loss_terms", loss)


@pytest.mark.parametrize("steps", [2, 100])
def test_losses_may_be_looked_at_late(block, monkeypatch, steps):
    """As on a device that runs ahead: the same numbers, told a few steps later."""
    told = []
    for late in (1, steps):
        monkeypatch.setattr(fit, "unseen_steps", lambda device, late=late: late)
        view, runner, data = block()
        seen = []
        with runner:
            report = fit_block(
                view,
                runner,
                data,
                settings(epochs=3),
                lambda step, loss, seen=seen: seen.append((step, loss)),
            )
        told.append((seen, report.epoch_losses, copies(view)))
    (at_once, losses, parameters), (later, same_losses, same) = told
    assert at_once == later and losses == same_losses and equal(parameters, same)


@pytest.mark.parametrize("steps", [2, 100])
def test_a_loss_that_is_not_finite_is_seen_late_too(block, monkeypatch, steps):
    monkeypatch.setattr(fit, "unseen_steps", lambda device: steps)
    view, *_ = prepared = block()
    before = copies(view)
    failing_from(monkeypatch, 1)
    report, initial, after = learn(prepared)
    assert report.non_finite == ["epoch 1: back to the best parameters so far"]
    assert equal(before, view.parameters) and after == initial


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
    view, *_ = prepared = block(batch_size=batch_size, lwc=True, let=True, let_lr=1.0, lwc_lr=1.0)
    start = copies(view)
    original = block_data.loss_terms

    def loss(output, targets, kind, weights=None, *, compiled=False):
        value = original(output, targets, kind)
        far = any((view.parameters[n].detach() - start[n]).abs().max() > 0.5 for n in start)
        return value * math.nan if far else value

    monkeypatch.setattr(block_data, "loss_terms", loss)
    report, before, after = learn(prepared, epochs=epochs)
    assert len(report.non_finite) == 1 and "back to the best" in report.non_finite[0]
    assert equal(start, view.parameters) and after == before


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("batch_size", [1, BATCHES])
def test_steps_into_infinity_end_at_finite_parameters(block, epochs, batch_size):
    view, *_ = prepared = block(batch_size=batch_size, lwc=True, let=True, let_lr=1e30, lwc_lr=1e30)
    report, before, after = learn(prepared, epochs=epochs)
    assert math.isfinite(after) and (after <= before or not report.non_finite)
    assert all(torch.isfinite(p).all() for p in view.parameters.values())


def test_gradients_that_are_not_finite(block, monkeypatch):
    view, *_ = prepared = block()
    before = copies(view)
    original = block_data.loss_terms

    def loss(output, targets, kind, weights=None, *, compiled=False):
        value = original(output, targets, kind)
        return value + 0 * (output - output.detach()).sum().sqrt()  # finite, its gradient is not

    monkeypatch.setattr(block_data, "loss_terms", loss)
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
        learn(block(model, lwc=True))
    assert "block 0" in str(error.value) and name in str(error.value)


def test_an_input_that_is_not_finite_is_named(block):
    *_, data = prepared = block(lwc=True)
    data.inputs.states[2, 3] = math.nan
    with pytest.raises(LRQuantError, match=r"block 0: the input of self_attn\.q_proj"):
        learn(prepared)


def test_a_target_that_is_not_finite_is_no_linear_s_fault(block):
    *_, data = prepared = block()
    data.targets[0].states[1] = math.nan
    with pytest.raises(LRQuantError, match="block 0: the block's output"):
        learn(prepared)
