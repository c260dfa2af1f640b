"""Linears that read one tensor share what they made of it, and nothing else."""

from __future__ import annotations

import gc

import pytest
import torch
from transformers import AutoModelForCausalLM

import lrquant  # noqa: F401  registers the format
from lrquant.runtime import reads
from lrquant.runtime.linear import IntegerLinear


@pytest.fixture
def counted(monkeypatch):
    """How often each linear's input was made ready, by the linear."""
    made = []
    before = IntegerLinear._made
    monkeypatch.setattr(
        IntegerLinear, "_made", lambda self, x: made.append(self) or before(self, x)
    )
    return made


@pytest.mark.parametrize(
    ("scheme", "settings"),
    [("W4A4-hadamard", {}), ("W4A8", {}), ("W4A16-hadamard", {}), ("W4A4", {"lac": True})],
)
def test_it_is_made_once_for_linears_that_read_one_tensor(
    saved, token_ids, counted, scheme, settings
):
    folder = saved("llama", scheme, format="lrquant", **settings)
    model = AutoModelForCausalLM.from_pretrained(folder)
    counted.clear()
    with torch.no_grad():
        shared = model(token_ids(2, 8), use_cache=False).logits
    names = {module: name for name, module in model.named_modules()}
    kinds = [names[module].rpartition(".")[2] for module in counted]
    assert kinds == ["q_proj", "o_proj", "gate_proj", "down_proj"] * 2
    assert torch.equal(shared, model(token_ids(2, 8), use_cache=False).logits), "with gradients"
    assert len(counted) == 8 + 14


def last_read(how="how"):
    last = reads.LastRead()
    return last, lambda values: last.of(values, how, lambda own: (own * 2,))[0]


@torch.no_grad()
def test_only_the_very_same_tensor_unchanged_is_taken():
    _, read = last_read()
    values = torch.ones(3)
    first = read(values)
    assert read(values) is first
    assert read(values.clone()) is not first
    again = read(values)
    values += 1
    assert torch.equal(read(values), torch.full((3,), 4.0)) and again is not first


@torch.no_grad()
def test_another_way_to_read_is_another_result():
    last = reads.LastRead()
    values = torch.ones(3)
    double, triple = (last.of(values, n, lambda own, n=n: (own * n,))[0] for n in (2, 3))
    assert torch.equal(triple, 1.5 * double)


@torch.inference_mode()
def test_tensors_of_inference_have_no_versions():
    _, read = last_read()
    values = torch.ones(3)
    assert read(values) is read(values)


@torch.no_grad()
def test_nothing_is_kept_longer_than_the_tensor():
    last, read = last_read()
    values = torch.ones(3)
    read(values)
    assert last._entry is not None
    del values
    gc.collect()
    assert last._entry is None
