"""The block loss: terms over branches, dynamic weights, and the measure that stays fixed."""

from __future__ import annotations

import pytest
import torch

from lrquant.learn.objective import CompiledTerms, Objective, loss_terms
from lrquant.numerics.compiled import why_not
from lrquant.numerics.losses import mean_squared_error, negative_log_cosine


@pytest.fixture
def outputs():
    """An output and the targets of two branches, (batch, tokens, hidden)."""
    return torch.randn(3, 2, 5, 8, generator=torch.Generator().manual_seed(0)).unbind(0)


def test_terms_of_one_branch(outputs):
    output, target, _ = outputs
    mse, nlc = mean_squared_error(output, target), negative_log_cosine(output, target)
    assert loss_terms(output, [target], "mse").tolist() == [mse.item()]
    assert loss_terms(output, [target], "nlc").tolist() == [nlc.item()]
    assert loss_terms(output, [target], "mse+nlc").tolist() == [mse.item(), nlc.item()]


def test_terms_of_two_branches_are_summed_apart(outputs):
    output, propagated, homologous = outputs
    both = loss_terms(output, [propagated, homologous], "mse+nlc")
    parts = [loss_terms(output, [target], "mse+nlc") for target in (propagated, homologous)]
    assert torch.allclose(both, parts[0] + parts[1], rtol=1e-6)
    assert not torch.allclose(both, 2 * parts[0], rtol=1e-2)


@pytest.mark.skipif(why_not(torch.device("cpu")) is not None, reason="nothing compiles here")
@pytest.mark.parametrize("weighted", [False, True])
def test_compiled_terms_have_the_same_gradient(outputs, weighted):
    output, *others = outputs
    targets = [output + 0.3 * each for each in others]
    weights = torch.tensor([[1.0, 0.5, 0.0, 2.0, 1.0]] * 2) if weighted else None
    to_terms = torch.tensor([2.0, 3.0])
    terms = mean_squared_error, negative_log_cosine
    gradients = []
    for compiled in (False, True):
        own = output.clone().requires_grad_()
        told = (
            CompiledTerms.apply(own, terms, weights, *targets)
            if compiled
            else loss_terms(own, targets, "mse+nlc", weights)
        )
        (told * to_terms).sum().backward()
        gradients.append(own.grad)
        assert torch.allclose(told, loss_terms(output, targets, "mse+nlc", weights), rtol=1e-6)
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-8)
    assert gradients[0].abs().max() > 1e-3


def test_without_dynamic_weights_the_loss_is_the_sum():
    objective = Objective(torch.tensor([5.0, 7.0]), False, "one")
    for terms in ([1.0, 2.0], [3.0, 0.5]):
        objective.see(torch.tensor(terms))
        assert float(objective.loss(torch.tensor(terms))) == sum(terms)
        assert objective.measure(torch.tensor(terms)) == sum(terms)


@pytest.mark.parametrize("ema_init", ["first", "one"])
def test_dynamic_weights_are_running_means(ema_init):
    """Against the equations of the paper, in Python floats."""
    objective = Objective(torch.tensor([100.0, 1e-3]), True, ema_init)
    sequence = [(100.0, 1e-3), (80.0, 2e-3), (90.0, 5e-4), (10.0, 1e-4)]
    means = [1.0, 1.0] if ema_init == "one" else list(sequence[0])
    for terms in sequence:
        means = [0.95 * e + 0.05 * loss for e, loss in zip(means, terms, strict=True)]
        expected = sum(loss / (e + 1e-6) for e, loss in zip(means, terms, strict=True))
        objective.see(torch.tensor(terms))
        assert float(objective.loss(torch.tensor(terms))) == pytest.approx(expected, rel=1e-5)


def test_the_published_start_mutes_small_losses():
    """Why the start at the first loss is the default: a small term weighs 1/e, not 1/L."""
    terms = torch.tensor([1e-3])
    objectives = [Objective(terms, True, start) for start in ("first", "one")]
    for objective in objectives:
        objective.see(terms)
    first, one = (float(objective.loss(terms)) for objective in objectives)
    assert first == pytest.approx(1, rel=2e-3) and one < 2e-3


def test_no_gradient_passes_through_the_running_means():
    terms = torch.tensor([4.0, 0.5], requires_grad=True)
    objective = Objective(terms.detach(), True, "first")
    objective.see(terms.detach())
    objective.loss(terms).backward()
    assert torch.allclose(terms.grad, 1 / (terms.detach() + 1e-6))


def test_the_measure_has_the_weights_of_the_start_at_every_step():
    start = torch.tensor([100.0, 1e-2])
    objective = Objective(start, True, "first")
    assert objective.measure(start) == pytest.approx(2, rel=1e-3)
    before = objective.measure(torch.tensor([50.0, 5e-3]))
    for _ in range(5):
        objective.see(torch.tensor([1.0, 1e-4]))
    assert objective.measure(torch.tensor([50.0, 5e-3])) == before == pytest.approx(1, rel=1e-3)
