"""Matrices: which values of a stored parameter each one is."""

from __future__ import annotations

import pytest
import torch

from lrquant.architectures.matrix import Matrix, experts, fused_linear, linear, linears


def numbered(*shape: int) -> torch.Tensor:
    """Every element another number."""
    return torch.arange(float(torch.Size(shape).numel())).view(shape)


def test_the_whole_of_a_linear():
    matrix, stored = linear("mlp.up"), numbered(6, 4)
    assert matrix == Matrix("mlp.up", "mlp.up.weight", reads="mlp.up", bias="mlp.up.bias")
    assert matrix.whole and torch.equal(matrix.of(stored), stored)
    assert torch.equal(matrix.of_bias(numbered(6)), numbered(6))
    assert linears("a", "b") == (linear("a"), linear("b"))


def test_some_rows():
    matrix, stored = Matrix("qkv.k", "qkv.weight", rows=(2, 5)), numbered(6, 4)
    assert torch.equal(matrix.of(stored), stored[2:5])
    assert torch.equal(matrix.of_bias(numbered(6)), torch.tensor([2.0, 3, 4]))


def test_one_expert():
    matrix, stored = Matrix("e.1", "e.down", expert=1), numbered(3, 6, 4)
    assert torch.equal(matrix.of(stored), stored[1])
    assert torch.equal(matrix.of_bias(numbered(3, 6)), numbered(3, 6)[1])


def test_inputs_first_in_the_store():
    matrix, stored = Matrix("c", "c.weight", transposed=True), numbered(4, 6)
    assert torch.equal(matrix.of(stored), stored.t())


def test_rows_of_one_expert_whose_inputs_come_first():
    matrix = Matrix("e.2.up", "e.gate_up", rows=(3, 6), expert=2, transposed=True)
    stored = numbered(3, 4, 6)
    assert torch.equal(matrix.of(stored), stored[2, :, 3:6].t())
    assert torch.equal(matrix.of_bias(numbered(3, 6)), numbered(3, 6)[2, 3:6])


@pytest.mark.parametrize(
    ("matrix", "shape"),
    [
        (linear("m"), (6, 4)),
        (Matrix("m", "m.weight", rows=(1, 3)), (6, 4)),
        (Matrix("m", "m.weight", expert=0), (2, 6, 4)),
        (Matrix("m", "m.weight", (0, 2), 1, True), (2, 4, 6)),
    ],
    ids=["whole", "rows", "expert", "rows of a transposed expert"],
)
def test_it_is_a_view(matrix, shape):
    stored = torch.zeros(shape)
    matrix.of(stored).fill_(1.0)
    assert int(stored.sum()) == matrix.of(stored).numel() > 0


@pytest.mark.parametrize(
    "part",
    [
        Matrix("m", "m.weight", rows=(0, 6)),
        Matrix("m", "m.weight", expert=0),
        Matrix("m", "m.weight", transposed=True),
        Matrix("m.q", "m.weight"),
    ],
)
def test_a_part_or_another_name_is_not_the_whole(part):
    assert not part.whole


def test_parts_of_a_fused_linear_follow_one_another():
    q, k, v = fused_linear("attn.qkv", q=4, k=2, v=2)
    assert [part.name for part in (q, k, v)] == ["attn.qkv.q", "attn.qkv.k", "attn.qkv.v"]
    assert [part.rows for part in (q, k, v)] == [(0, 4), (4, 6), (6, 8)]
    assert {(part.parameter, part.reads, part.bias) for part in (q, k, v)} == {
        ("attn.qkv.weight", "attn.qkv", "attn.qkv.bias")
    }
    stored = numbered(8, 3)
    assert torch.equal(torch.cat([part.of(stored) for part in (q, k, v)]), stored)
    assert not any(part.whole for part in (q, k, v))


@pytest.mark.parametrize("transposed", [False, True])
def test_parts_of_experts_cover_their_parameter_once(transposed):
    matrices = experts("moe", "gate_up", 3, reads_input=True, transposed=transposed, gate=4, up=4)
    assert [matrix.name for matrix in matrices[:3]] == ["moe.0.gate", "moe.0.up", "moe.1.gate"]
    assert len(matrices) == len({matrix.name for matrix in matrices}) == 6
    assert {matrix.parameter for matrix in matrices} == {"moe.gate_up"}
    stored = numbered(3, 5, 8) if transposed else numbered(3, 8, 5)
    parts = [matrix.of(stored) for matrix in matrices]
    assert {tuple(part.shape) for part in parts} == {(4, 5)}
    assert torch.equal(torch.cat([p.flatten() for p in parts]).sort().values, stored.flatten())


def test_an_expert_s_second_matrix_reads_what_stays_inside():
    (first, _) = experts("moe", "gate_up", 2, reads_input=True, up=4)
    (second, _) = experts("moe", "down", 2, reads_input=False, down=4)
    assert (first.reads, second.reads) == ("moe", second.name) == ("moe", "moe.0.down")
    assert first.bias is None and second.bias is None
