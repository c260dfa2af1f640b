"""Attention that torch's own function does not compute, against transformers' eager functions."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AttentionInterface
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as capped
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as sunk

from lrquant import LRQuantError, quantize
from lrquant.blocks.attention import attention_name
from lrquant.numerics import tokens
from lrquant.numerics.grids.integer import IntegerGrid

TOKENS, SCALING = 6, 0.7
CAUSAL = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
WINDOW = CAUSAL & ~CAUSAL.tril(-3)


class Attending(nn.Module):
    """What attention functions read of a module: four heads on two of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.num_key_value_groups, self.is_causal, self.head_dim = 2, True, 8
        self.sinks = nn.Parameter(torch.tensor([0.5, -1.0, 2.0, 0.0]), requires_grad=False)


def added(mask: torch.Tensor) -> torch.Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


@pytest.fixture
def states():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, heads, TOKENS, 8, generator=generator) for heads in (4, 2, 2)]


def own(states, mask, grid=None, **arguments) -> torch.Tensor:
    attention = AttentionInterface()[attention_name(grid)]
    return attention(Attending(), *states, mask, scaling=SCALING, **arguments)[0]


MASKS = {
    "none": (None, CAUSAL),
    "causal": (CAUSAL, CAUSAL),
    "window": (WINDOW, WINDOW),
    "added": (added(WINDOW), WINDOW),
}


@pytest.mark.parametrize("given, meant", MASKS.values(), ids=MASKS)
def test_soft_caps_and_sinks_are_those_of_transformers(given, meant, states):
    module = Attending()
    soft, _ = capped(module, *states, added(meant), scaling=SCALING, softcap=1.5)
    torch.testing.assert_close(own(states, given, softcap=1.5), soft)
    sinking, _ = sunk(module, *states, added(meant), scaling=SCALING)
    torch.testing.assert_close(own(states, given, s_aux=module.sinks), sinking)
    plain = own(states, given)
    assert (plain - soft).abs().max() > 1e-2 and (plain - sinking).abs().max() > 1e-2


def test_one_token_sees_all_before_it(states):
    query, key, value = states
    last = [query[:, :, -1:], key, value]
    for arguments in ({"softcap": 1.5}, {"s_aux": Attending().sinks}, {}):
        whole = own(states, None, **arguments)[:, -1:]
        torch.testing.assert_close(own(last, None, **arguments), whole)


def test_they_read_quantised_states(states):
    coarse = own(states, None, IntegerGrid(2), softcap=1.5)
    assert (coarse - own(states, None, softcap=1.5)).abs().max() > 1e-2


def test_their_quantizers_may_be_compiled(states, monkeypatch):
    """What is compiled is called through one function: here it calls what it was to compile."""
    calls = []

    def called(function, *arguments, by_size=True):
        calls.append(function.__name__)
        return function(*arguments)

    monkeypatch.setattr(tokens, "call_compiled", called)
    plain = own(states, None, IntegerGrid(2))
    assert not calls
    attention = AttentionInterface()[attention_name(IntegerGrid(2), compiled=True)]
    assert torch.equal(attention(Attending(), *states, None, scaling=SCALING)[0], plain)
    assert calls == ["_round_trip"] * 3


@pytest.mark.parametrize("name", ["bloom", "falcon"])
def test_own_code_of_a_family_refuses_quantised_states_before_anything(
    name, make_model, token_ids, tmp_path
):
    """Negative control: with them in full precision it runs."""
    settings = {"calibration": token_ids(1, 12), "epochs": 0, "output_dir": str(tmp_path / "run")}
    with pytest.raises(LRQuantError, match=r"self_attention: attention is .* use --qkv_bits 16"):
        quantize(make_model(name), "W4A4", **settings)
    assert not (tmp_path / "run").exists()
    assert quantize(make_model(name), "W4A4-qkv16", **settings).records


def test_rotated_queries_and_keys_have_the_same_products(states):
    attention = AttentionInterface()[attention_name(None, rotated=True)]
    found = attention(Attending(), *states, None, scaling=SCALING)[0]
    torch.testing.assert_close(found, own(states, None))


def test_a_channel_of_keys_that_is_large_costs_less_when_they_are_rotated():
    """As after a rotary embedding; values lie on their grid already."""
    query, key, value = torch.randn(3, 2, 4, 32, 64, generator=torch.Generator().manual_seed(0))
    key[..., 0] += 20
    value = value.sign()
    exact, *found = (
        AttentionInterface()[attention_name(grid, rotated=rotated)](
            Attending(), query, key[:, :2], value[:, :2], None
        )[0]
        for grid, rotated in ((None, False), (IntegerGrid(4), False), (IntegerGrid(4), True))
    )
    plain, rotated = (float((each - exact).square().mean()) for each in found)
    assert rotated < 0.5 * plain
