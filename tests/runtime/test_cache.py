"""The quantised cache: a step at a time gives what the whole text gives, in fewer bytes."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from lrquant import LRQuantError, QuantizedCache
from lrquant.blocks.attention import attention_name, mark_quantized
from lrquant.numerics.grids.integer import IntegerGrid
from lrquant.numerics.tokens import fake_quantize_tokens
from lrquant.runtime.cache import _Layer


@pytest.fixture
def loaded(saved):
    def load(family, scheme):
        return AutoModelForCausalLM.from_pretrained(
            saved(family, scheme, format="lrquant", epochs=1)
        )

    return load


@torch.no_grad()
def step_by_step(model, ids, cache):
    """Logits with the first seven tokens at once, then one at a time."""
    parts = [ids[:, :7], *ids[:, 7:].split(1, 1)]
    return torch.cat([model(part, past_key_values=cache).logits for part in parts], 1)


@pytest.mark.parametrize(
    ("family", "scheme"),
    [
        *(("llama", "W4A4"), ("mistral-sliding", "W6A6"), ("qwen2-alternating", "W4A4")),
        *(("qwen3", "W8A8"), ("opt", "W4A4"), ("llama", "W4A16-qkv3")),
        ("llama", "W4A8-qkv4-r3"),
    ],
)
def test_steps_give_what_the_whole_text_gives(loaded, token_ids, assert_alike, family, scheme):
    model, ids = loaded(family, scheme), token_ids(2, 16)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    cache, plain = QuantizedCache(model.config), DynamicCache()
    found = step_by_step(model, ids, cache)
    assert_alike(found, whole)
    assert torch.equal(found, step_by_step(model, ids, plain)), "the codes say it exactly"
    assert cache.get_seq_length() == 16
    values = sum(layer.keys.nbytes + layer.values.nbytes for layer in plain.layers)
    assert cache.nbytes < values / 2, "even with heads of 8 channels, in float32"
    beams = model.generate(
        ids[:1, :4],
        max_new_tokens=3,
        min_new_tokens=3,
        num_beams=2,
        do_sample=False,
        past_key_values=QuantizedCache(model.config),
    )
    assert beams.shape == (1, 7)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("head_dim", [7, 8])
def test_what_it_holds_decodes_bit_for_bit(bits, symmetric, head_dim):
    grid = IntegerGrid(bits, symmetric=symmetric)
    layer = _Layer(grid)
    states = torch.randn(2, 3, 11, head_dim, generator=torch.Generator().manual_seed(bits))
    layer.update(states[:, :, :4], -states[:, :, :4])
    keys, values = layer.update(states[:, :, 4:], -states[:, :, 4:])
    assert torch.equal(keys, fake_quantize_tokens(states, grid))
    assert torch.equal(values, fake_quantize_tokens(-states, grid))
    width = -(-head_dim // 2) if bits <= 4 else head_dim
    assert layer.keys.shape == (2, 3, 11, width + 5) and layer.keys.dtype == torch.uint8


def test_one_token_of_one_head_is_aligned():
    states = torch.randn(1, 1, 1, 6)
    keys, _ = _Layer(IntegerGrid(4)).update(states, -states)
    assert torch.equal(keys, fake_quantize_tokens(states, IntegerGrid(4)))


def test_keys_and_values_may_differ_in_width():
    grid = IntegerGrid(4)
    keys, values = torch.randn(1, 2, 5, 7), torch.randn(1, 2, 5, 12)
    found = _Layer(grid).update(keys, values)
    for given, decoded in zip((keys, values), found, strict=True):
        assert torch.equal(decoded, fake_quantize_tokens(given, grid))


def test_marked_states_are_not_quantised_again(make_model):
    """Negative control: unmarked ones are."""
    from transformers import AttentionInterface

    attention = AttentionInterface()[attention_name(IntegerGrid(2))]
    module = make_model("llama").model.layers[0].self_attn
    states = [torch.randn(1, n, 5, 8, generator=torch.Generator().manual_seed(n)) for n in (4, 2)]
    query, key = states
    unmarked, _ = attention(module, query, key, key, None)
    marked, _ = attention(module, query, mark_quantized(key), key, None)
    assert not torch.allclose(unmarked, marked)


def test_a_model_whose_cache_is_not_quantised_has_no_use_for_it(loaded, make_model):
    for model in (loaded("llama", "W4A16"), make_model("llama")):
        with pytest.raises(LRQuantError, match="leave past_key_values out"):
            QuantizedCache(model.config)
