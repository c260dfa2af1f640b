"""Block losses against the formulas of algorithm.md, section 3, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from lrquant.numerics.losses import mean_squared_error, negative_log_cosine


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(2, 5, 16, generator=generator)
    return target + 0.8 * torch.randn(2, 5, 16, generator=generator), target


def direct_nlc(output: torch.Tensor, target: torch.Tensor) -> float:
    cosines = []
    pairs = zip(output.reshape(-1, 16).double(), target.reshape(-1, 16).double(), strict=True)
    for left, right in pairs:
        cosines.append(float(left @ right / (left.norm() * right.norm())))
    return -math.log(abs(sum(cosines) / len(cosines)))


def test_mean_squared_error(pair):
    output, target = pair
    direct = (output.double() - target.double()).square().sum() / output.numel()
    assert float(mean_squared_error(output, target)) == pytest.approx(float(direct), rel=1e-6)


def test_negative_log_cosine(pair):
    assert float(negative_log_cosine(*pair)) == pytest.approx(direct_nlc(*pair), rel=1e-5)


def test_negative_log_cosine_is_of_the_mean_cosine_not_the_mean_of_logs(pair):
    """Negative control: averaging after the logarithm is another number."""
    cosine = torch.nn.functional.cosine_similarity(*pair, dim=-1)
    wrong = float(-torch.log(cosine.abs()).mean())
    assert abs(float(negative_log_cosine(*pair)) - wrong) > 1e-3


def test_opposite_tokens_cancel_in_the_mean_cosine(pair):
    output = pair[1].clone()
    output[0, 0] *= -1
    assert float(negative_log_cosine(output, pair[1])) == pytest.approx(-math.log(0.8), rel=1e-5)


@pytest.mark.parametrize("step", [1e-2, 1e-3, 1e-4, 1e-5])
def test_nearly_equal_outputs_keep_their_digits(step):
    """A float32 cosine is a multiple of 6e-8 away from 1, and 1e-10 would be lost, or negative."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(1, 64, 1024, generator=generator)
    target[..., 7] *= 300
    output = target + step * target.abs() * torch.randn(target.shape, generator=generator)
    pairs = output.double(), target.double()
    cosine = torch.nn.functional.cosine_similarity(*pairs, dim=-1).mean()
    found = float(negative_log_cosine(output, target))
    assert found == pytest.approx(float(-torch.log(cosine)), rel=1e-2, abs=1e-13) and found > 0


def test_outputs_that_point_away():
    """Beyond a right angle on average: the absolute value of the cosine counts."""
    target = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    output = -target + 0.3 * torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    cosine = torch.nn.functional.cosine_similarity(output, target, dim=-1).mean()
    assert cosine < -0.8
    expected = float(-torch.log(cosine.abs()))
    assert float(negative_log_cosine(output, target)) == pytest.approx(expected, rel=1e-5)


def test_cosine_ignores_length_and_mse_does_not(pair):
    target = pair[1]
    assert float(negative_log_cosine(3 * target, target)) == pytest.approx(0, abs=1e-6)
    assert float(negative_log_cosine(-target, target)) == pytest.approx(0, abs=1e-6)
    assert float(mean_squared_error(3 * target, target)) > 1


@pytest.mark.parametrize("loss", [mean_squared_error, negative_log_cosine])
def test_a_loss_of_nothing_is_zero(pair, loss):
    assert float(loss(pair[1], pair[1])) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("loss", [mean_squared_error, negative_log_cosine])
def test_bfloat16_is_accumulated_in_float32(pair, loss):
    halves = [values.bfloat16() for values in pair]
    found = loss(*halves)
    assert found.dtype == torch.float32
    assert torch.equal(found, loss(*(values.float() for values in halves)))


@pytest.mark.parametrize("loss", [mean_squared_error, negative_log_cosine])
def test_gradients(pair, loss):
    """Against central differences in float64."""
    output, target = pair
    leaf = output.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf, target), leaf)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).double()

    def at(step: float) -> float:
        moved = output.double() + step * direction
        if loss is negative_log_cosine:
            return direct_nlc(moved, target)
        return float((moved - target.double()).square().mean())

    slope = (at(1e-5) - at(-1e-5)) / 2e-5
    assert float((gradient.double() * direction).sum()) == pytest.approx(slope, rel=1e-4)
