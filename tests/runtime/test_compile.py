"""A native checkpoint under torch.compile."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import lrquant  # noqa: F401  registers the format


@pytest.mark.parametrize("scheme", ["W4A8", "W4A16g16"])
def test_a_loaded_model_is_one_graph(saved, token_ids, scheme):
    model = AutoModelForCausalLM.from_pretrained(saved("llama", scheme, format="lrquant"))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    ids = token_ids(1, 8)
    with torch.no_grad():
        plain, traced = model(ids, use_cache=False), compiled(ids, use_cache=False)
    assert torch.equal(plain.logits, traced.logits)
