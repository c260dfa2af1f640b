"""Parameters put together from their matrices: the inverse of `Matrix.of`."""

from __future__ import annotations

import pytest
import torch

from lrquant.architectures.matrix import Matrix, experts, fused_linear, linear
from lrquant.blocks.assembly import assembled, assembled_biases

LAYOUTS = {
    "whole linears": ((linear("a"), linear("b")), {"a.weight": (6, 4), "b.weight": (3, 6)}),
    "a fused linear": (fused_linear("qkv", q=4, k=2, v=2), {"qkv.weight": (8, 5)}),
    "inputs first": ((Matrix("c", "c.weight", transposed=True),), {"c.weight": (4, 6)}),
    "experts": (
        (
            *experts("moe", "gate_up", 3, reads_input=True, gate=4, up=4),
            *experts("moe", "down", 3, reads_input=False, down=5),
        ),
        {"moe.gate_up": (3, 8, 5), "moe.down": (3, 5, 4)},
    ),
    "experts, inputs first": (
        experts("moe", "gate_up", 12, reads_input=True, transposed=True, gate=4, up=2),
        {"moe.gate_up": (12, 5, 6)},
    ),
}
EVERY = pytest.mark.parametrize("layout", LAYOUTS)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def taken_apart(layout: str):
    """Stored parameters, the matrices by name and their values."""
    matrices, shapes = LAYOUTS[layout]
    stored = {name: random(*shape, seed=len(name)) for name, shape in shapes.items()}
    by_name = {matrix.name: matrix for matrix in matrices}
    return stored, by_name, {name: m.of(stored[m.parameter]) for name, m in by_name.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@EVERY
def test_it_is_the_inverse_of_taking_apart(layout):
    stored, matrices, values = taken_apart(layout)
    assert_same(assembled(matrices, values), stored)


@EVERY
def test_the_order_of_the_values_does_not_matter(layout):
    stored, matrices, values = taken_apart(layout)
    backwards = dict(reversed(values.items()))
    assert_same(assembled(matrices, backwards), stored)


@EVERY
def test_a_changed_matrix_is_seen_in_its_place_and_nowhere_else(layout):
    """Negative control: each value has a place of its own."""
    stored, matrices, values = taken_apart(layout)
    for name, matrix in matrices.items():
        result = assembled(matrices, {**values, name: values[name] + 1})
        expected = {parameter: tensor.clone() for parameter, tensor in stored.items()}
        matrix.of(expected[matrix.parameter]).add_(1)
        assert_same(result, expected)


@EVERY
def test_gradients_reach_every_matrix_alone(layout):
    stored, matrices, values = taken_apart(layout)
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    result = assembled(matrices, leaves)
    weights = {name: random(*tensor.shape, seed=9) for name, tensor in stored.items()}
    sum((result[name] * weights[name]).sum() for name in stored).backward()
    for name, matrix in matrices.items():
        assert torch.equal(leaves[name].grad, matrix.of(weights[matrix.parameter])), name


def test_a_matrix_that_is_all_of_its_parameter_is_not_copied():
    value = random(6, 4)
    assert assembled({"a": linear("a")}, {"a": value})["a.weight"] is value


def test_biases_of_parts_are_one():
    matrices = {m.name: m for m in (*fused_linear("qkv", q=4, k=2, v=2), linear("o"))}
    stored = {"qkv.bias": random(8), "o.bias": random(3)}
    values = {name: m.of_bias(stored[str(m.bias)]) for name, m in matrices.items()}
    assert_same(assembled_biases(matrices, dict(reversed(values.items()))), stored)
    assert assembled_biases(matrices, {"o": stored["o.bias"]}).keys() == {"o.bias"}


def test_biases_of_experts_are_one():
    matrices = {
        f"moe.{expert}.{name}": Matrix(
            f"moe.{expert}.{name}", "moe.w", rows, expert, True, "moe", "moe.b"
        )
        for expert in range(3)
        for name, rows in (("gate", (0, 4)), ("up", (4, 6)))
    }
    stored = random(3, 6)
    values = {name: matrix.of_bias(stored) for name, matrix in matrices.items()}
    assert_same(assembled_biases(matrices, values), {"moe.b": stored})
