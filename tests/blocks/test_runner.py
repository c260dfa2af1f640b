"""Running block by block: the same logits as transformers, causality, quantised attention, streams.

Also the materialised model, which must compute what the stream of blocks computes.
"""

from __future__ import annotations

import dataclasses
import errno
import math
import os
import weakref

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lrquant.blocks.head import Head, tokens_at_once
from lrquant.blocks.inputs import BlockInputs
from lrquant.blocks.materialize import materialize
from lrquant.blocks.plan import Plan, learned_by
from lrquant.blocks.runner import PreparedBlock, Variant
from lrquant.blocks.streams import Stream, batches_of
from lrquant.blocks.workbench import Workbench
from lrquant.config.choices import KINDS
from lrquant.config.scheme import FLOATING_POINT, Scheme
from lrquant.config.schemes import Schemes
from lrquant.data.feeds import Feed
from lrquant.errors import LRQuantError
from lrquant.ingredients.base.statistics import ChannelStatistics
from lrquant.ingredients.ingredient import Ingredient
from lrquant.measures.perplexity import MEASURE as PERPLEXITY
from lrquant.measures.scoring.predictions import score, send_through
from lrquant.model.loading import from_module

CPU = torch.device("cpu")
TOKENS = 12
W4A4 = Scheme(4, 4)
Learned = tuple[Ingredient, ...]


def planned(bench: Workbench, scheme: Scheme, learned: Learned = ()) -> Workbench:
    return dataclasses.replace(bench, plan=Plan(Schemes(scheme), learned))


def prepare(bench: Workbench, index: int, scheme: Scheme, learned: Learned = ()):
    """A block under a scheme, with every clipping logit and scale away from its start."""
    if bench.model.architecture.own_attention and not scheme.floating_point:
        scheme = dataclasses.replace(scheme, qkv_bits=16)
    bench = planned(bench, scheme, learned)
    view = bench.view(index, bench.stored(index))
    if learned:
        maxima = {
            f"{view.plan.name}.{matrix.reads}": torch.linspace(1, 9, view.weight(name).shape[1])
            for name, matrix in view.matrices.items()
        }
        view.initialize(ChannelStatistics(maxima))
        generator = torch.Generator().manual_seed(index)
        for name, values in view.parameters.items():
            noise = 0.3 * torch.randn(values.shape, generator=generator)
            view.parameters[name] = values * noise.exp() if ".scale" in name else values + noise
    return PreparedBlock(bench.runner(index, view), view.freeze().tensors(view.dtype))


@torch.no_grad()
def streamed_logits(bench, ids, batch_size=1, scheme=FLOATING_POINT, learned=()):
    entry = BlockInputs(bench.model, ids, batch_size, bench.device)
    (stream,) = bench.streams(entry, 1)
    entry.embed(stream)
    for index in range(len(bench.model.blocks)):
        prepared = prepare(bench, index, scheme, learned)
        with prepared.runner as runner:
            for batch, samples in enumerate(entry.batches):
                handed = stream.handed_on(samples)
                arguments = entry.arguments(batch, index, handed)
                stream.write(samples, runner(prepared.tensors, stream.read(samples), arguments))
                stream.hand_on(samples, handed, stream)
    head = Head(bench.model, bench.device, bench.dtype)
    return torch.cat([head(stream.read(samples)) for samples in entry.batches])


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_blocks_in_a_row_are_the_model(batch_size, variant, make_model, make_bench, token_ids):
    """Three samples: with batches of two the last one is ragged."""
    module = make_model(variant)
    ids = token_ids(3, TOKENS)
    found, expected = streamed_logits(make_bench(module), ids, batch_size), module(ids).logits
    largest = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * largest)


def test_a_bfloat16_checkpoint_is_run_in_float32(make_model, make_bench, token_ids):
    stored, module = make_model("qwen2", torch.bfloat16), make_model("qwen2")
    module.load_state_dict(stored.state_dict())
    found = streamed_logits(make_bench(stored), token_ids(2, TOKENS))
    expected = module(token_ids(2, TOKENS)).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def has_experts(module) -> bool:
    model = from_module(module)
    return any(m.expert is not None for i in range(len(model.blocks)) for m in model.matrices(i))


def test_bfloat16_products_are_near_the_model(variant, make_model, make_bench, token_ids):
    module = make_model(variant)
    ids = token_ids(2, TOKENS)
    found = streamed_logits(make_bench(module, torch.bfloat16), ids).float()
    expected = module(ids).logits
    far = 0.2 if has_experts(module) else 0.05  # a router that is near a tie takes another expert
    assert 1e-4 < (found - expected).std() / expected.std() < far


@pytest.mark.parametrize("scheme", [FLOATING_POINT, W4A4], ids=lambda scheme: scheme.name)
def test_a_token_does_not_see_later_ones(scheme, variant, make_model, make_bench, token_ids):
    bench = make_bench(make_model(variant))
    ids = token_ids(1, TOKENS)
    changed = ids.clone()
    changed[0, 7] = (changed[0, 7] + 5) % 200 + 3
    before, after = (streamed_logits(bench, tokens, scheme=scheme) for tokens in (ids, changed))
    early = before[:, :7], after[:, :7]
    if has_experts(make_model(variant)):
        # how many tokens an expert multiplies at once decides how its sums are rounded
        edge = 1e-4 if scheme is FLOATING_POINT else 0.1  # a code on a tie may move
        torch.testing.assert_close(*early, rtol=0, atol=edge)
    else:
        assert torch.equal(*early)
    assert not torch.allclose(before[:, 7], after[:, 7])
    assert not torch.allclose(before[:, 8], after[:, 8])  # and later ones see it


@pytest.mark.parametrize("name, reach", [("mistral-sliding", 6), ("mistral", TOKENS - 1)])
def test_a_sliding_window_bounds_what_is_seen(name, reach, make_model, make_bench, token_ids):
    """Two blocks with a window of 4 tokens carry a change 3 tokens each."""
    bench = make_bench(make_model(name))
    ids = token_ids(1, TOKENS)
    changed = ids.clone()
    changed[0, 0] = (changed[0, 0] + 5) % 200 + 3
    before, after = (streamed_logits(bench, tokens) for tokens in (ids, changed))
    moved = (before != after).any(-1)[0].nonzero().flatten().tolist()
    assert moved == list(range(reach + 1))


def test_batch_size_does_not_change_quantised_results(make_model, make_bench, token_ids):
    bench = make_bench(make_model("opt"))
    ids = token_ids(3, TOKENS)
    one, two = (streamed_logits(bench, ids, size, Scheme(8, 8)) for size in (1, 2))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_blocks_get_their_own_arguments(make_model, make_bench, token_ids):
    """Full and sliding attention alternate: the first block has no window, the second one has."""
    bench = make_bench(make_model("qwen2-alternating"))
    entry = BlockInputs(bench.model, token_ids(2, TOKENS), 1, CPU)
    entry.embed(bench.streams(entry, 1)[0])
    masks = [entry.arguments(0, block)["attention_mask"] for block in range(2)]
    assert masks[0] is None or masks[0].sum() > masks[1].sum()
    assert masks[1].sum(-1).max() == 4


def test_equal_arguments_are_kept_once(make_model, make_bench, token_ids):
    bench = make_bench(make_model("mistral-sliding"))
    entry = BlockInputs(bench.model, token_ids(5, TOKENS), 2, CPU)
    entry.embed(bench.streams(entry, 1)[0])
    assert [b.samples for b in entry.batches] == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert [b.shape for b in entry.batches] == [(2, TOKENS), (2, TOKENS), (1, TOKENS)]
    assert entry.arguments(0, 1) is entry.arguments(1, 1)


def round_trip(states: torch.Tensor, bits: int) -> torch.Tensor:
    """Asymmetric codes on the range of the last axis, written from algorithm.md."""
    low = states.amin(-1, keepdim=True).clamp(max=0)
    high = states.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-5)
    zero_point = torch.round(-low / scale)
    codes = (torch.round(states / scale) + zero_point).clamp(0, 2**bits - 1)
    return scale * (codes - zero_point)


def eager_llama_block(block: nn.Module, states, arguments, bits: int, where: str) -> torch.Tensor:
    """A LLaMA block by hand, Q, K and V quantised "after" or "before" the rotary embedding."""
    samples, tokens, _ = states.shape
    attention, mlp = block.self_attn, block.mlp
    normed = block.input_layernorm(states)
    query, key, value = (
        linear(normed).view(samples, tokens, -1, attention.head_dim).transpose(1, 2)
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if where == "before":
        query, key, value = (round_trip(part, bits) for part in (query, key, value))
    query, key = apply_rotary_pos_emb(query, key, *arguments["position_embeddings"])
    if where == "after":
        query, key, value = (round_trip(part, bits) for part in (query, key, value))
    repeats = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(repeats, 1) for part in (key, value))
    scores = query @ key.transpose(-1, -2) / math.sqrt(attention.head_dim)
    later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(later, -math.inf).softmax(-1)
    mixed = (weights @ value).transpose(1, 2).reshape(samples, tokens, -1)
    states = states + attention.o_proj(mixed)
    normed = block.post_attention_layernorm(states)
    return states + mlp.down_proj(nn.functional.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed))


@pytest.mark.parametrize("bits", [3, 4, 8, 16])
def test_queries_keys_and_values_are_quantised_after_the_rotation(
    bits, make_model, make_bench, token_ids
):
    module = make_model("llama")
    bench = make_bench(module)
    entry = BlockInputs(bench.model, token_ids(2, TOKENS), 2, CPU)
    (stream,) = bench.streams(entry, 1)
    entry.embed(stream)
    states, arguments = stream.read(entry.batches[0]), entry.arguments(0, 0)
    prepared = prepare(bench, 0, Scheme(16, 16, qkv_bits=bits))
    with prepared.runner as runner:
        found = runner(prepared.tensors, states, arguments)
    block = module.model.layers[0]
    expected = {
        where: eager_llama_block(block, states, arguments, bits, where)
        for where in ("after", "before", "never")
    }
    right = "never" if bits == 16 else "after"
    torch.testing.assert_close(found, expected[right], rtol=1e-5, atol=1e-5)
    for wrong in {"after", "before", "never"} - {right} if bits < 16 else ():
        assert (found - expected[wrong]).abs().max() > 1e-3, wrong


def test_linear_inputs_are_quantised_once_and_shared(make_model, make_bench, token_ids):
    """What each linear reads has few values a token; q, k and v read the same tensor."""
    bench = make_bench(make_model("llama"))
    entry = BlockInputs(bench.model, token_ids(2, TOKENS), 2, CPU)
    (stream,) = bench.streams(entry, 1)
    entry.embed(stream)
    prepared = prepare(bench, 0, Scheme(16, 3))
    observed, read, handles = {}, {}, []
    linears = [matrix.name for matrix in bench.model.matrices(0)]
    prepared.runner.observer = lambda name, values: observed.update({name: values.clone()})
    with prepared.runner as runner:
        for name in linears:
            linear = bench.model.blocks[0].get_submodule(name)
            handles.append(
                linear.register_forward_pre_hook(
                    lambda module, inputs, name=name: read.update({name: inputs[0]})
                )
            )
        runner(prepared.tensors, stream.read(entry.batches[0]), entry.arguments(0, 0))
    for handle in handles:
        handle.remove()
    assert observed.keys() == read.keys() == set(linears)
    for name, values in read.items():
        assert torch.equal(values, round_trip(observed[name], 3)), name
        assert max(len(token.unique()) for token in values.flatten(0, 1)) <= 8
        assert not torch.equal(values, observed[name])
    assert read["self_attn.q_proj"] is read["self_attn.v_proj"]
    assert read["mlp.gate_proj"] is read["mlp.up_proj"]
    kept = [weakref.ref(values) for values in read.values()]
    del values
    read.clear()
    assert not any(reference() is not None for reference in kept), "let go with the block's end"


def hooks(module: nn.Module) -> int:
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return sum(len(getattr(part, table)) for part in module.modules() for table in tables)


@pytest.mark.parametrize("fails", [False, True], ids=["normal exit", "exception"])
def test_nothing_is_left_behind(fails, make_model, make_bench, token_ids):
    bench = make_bench(make_model("llama"))
    skeleton = bench.model.skeleton
    blocks, config = list(bench.model.blocks), skeleton.config.to_dict()
    attention = skeleton.config._attn_implementation
    ids = token_ids(2, TOKENS)
    entry = BlockInputs(bench.model, ids, 1, CPU)
    (stream,) = bench.streams(entry, 1)
    entry.embed(stream)
    bench = planned(bench, W4A4, learned_by(let=True, let_sites=KINDS, let_shift="always"))
    view = bench.view(0, bench.stored(0))
    ones = {
        f"{view.plan.name}.{linear}": torch.ones(view.weight(linear).shape[1])
        for linear in view.matrices
    }
    view.initialize(ChannelStatistics(ones))
    runner = bench.runner(0, view)
    try:
        with runner:
            assert hooks(skeleton) > 0
            states = stream.read(entry.batches[0])
            runner(view.tensors(), states[..., :-1] if fails else states, entry.arguments(0, 0))
    except RuntimeError:
        assert fails
    Head(bench.model, CPU, torch.float32)(stream.read(entry.batches[0]))
    assert hooks(skeleton) == 0
    assert skeleton.config._attn_implementation == attention
    assert skeleton.config.to_dict() == config
    assert all(a is b for a, b in zip(blocks, bench.model.blocks, strict=True))
    assert all(parameter.is_meta for parameter in skeleton.parameters())


def test_the_original_model_is_not_changed(make_model, make_bench, token_ids):
    module = make_model("opt")
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    attention = module.config._attn_implementation
    learned = learned_by(lwc=True, let=True, let_sites=KINDS)
    streamed_logits(make_bench(module), token_ids(2, TOKENS), 1, W4A4, learned)
    assert module.config._attn_implementation == attention and hooks(module) == 0
    assert all(torch.equal(before[name], t) for name, t in module.state_dict().items())


def test_blocks_are_put_back_when_embedding_fails(make_model, make_bench, token_ids):
    bench = make_bench(make_model("llama"))
    blocks = list(bench.model.blocks)
    entry = BlockInputs(bench.model, token_ids(1, TOKENS) + 10000, 1, CPU)
    with pytest.raises(IndexError):
        entry.embed(bench.streams(entry, 1)[0])
    assert all(a is b for a, b in zip(blocks, bench.model.blocks, strict=True))


@pytest.mark.parametrize("place", ["device", "host", "disk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streams_hold_the_same_wherever_they_are(place, dtype, tmp_path):
    states = torch.randn(5, 4, 8, generator=torch.Generator().manual_seed(0))
    parts = [slice(0, 2), slice(2, 4), slice(4, 5)]
    batches = batches_of(parts, [(2, 4), (2, 4), (1, 4)])
    stream = Stream((20, 8), dtype, CPU, place, tmp_path)
    assert list(tmp_path.iterdir()) == []
    for batch in batches:
        stream.write(batch, states[batch.samples])
    assert stream.states.dtype == dtype and stream.nbytes == 160 * stream.states.element_size()
    found = torch.cat([stream.read(batch) for batch in batches[1:]])
    assert found.dtype == torch.float32
    assert torch.equal(found, states[2:5].to(dtype).float())
    other = Stream((20, 8), dtype, CPU, "host")
    other.copy(stream)
    (whole,) = batches_of([slice(0, 5)], [(5, 4)])
    stream.write(whole, torch.zeros(5, 4, 8))
    assert torch.equal(other.read(whole), states.to(dtype).float())
    del stream
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["host", "disk"])
def test_a_run_is_the_same_on_host_and_disk(place, make_model, make_bench, token_ids, tmp_path):
    bench = make_bench(make_model("llama"))
    moved = Workbench(bench.model, CPU, torch.float32, place, tmp_path)
    ids = token_ids(3, TOKENS)
    found = streamed_logits(moved, ids, 2, W4A4)
    assert torch.equal(found, streamed_logits(bench, ids, 2, W4A4))


def test_a_full_disk_is_said_and_leaves_no_file(tmp_path, monkeypatch):
    def full(handle, offset, length):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(LRQuantError) as caught:
        Stream((1024 * 1024, 1024), torch.bfloat16, CPU, "disk", tmp_path)
    message = str(caught.value)
    assert "no space for 2.0 GiB of hidden states" in message and str(tmp_path) in message
    assert "No space left on device" in message and "--offload host" in message
    assert list(tmp_path.iterdir()) == []


def test_a_missing_scratch_folder_is_said(tmp_path):
    with pytest.raises(LRQuantError, match="nowhere"):
        Stream((2, 4), torch.float32, CPU, "disk", tmp_path / "nowhere")


def test_perplexity_is_that_of_the_model(variant, make_model, make_bench, token_ids):
    module = make_model(variant)
    bench = make_bench(module)
    ids = token_ids(3, TOKENS)
    entry = BlockInputs(bench.model, ids, 2, CPU)
    (stream,) = bench.streams(entry, 1)
    plain = Variant(lambda index: prepare(bench, index, FLOATING_POINT))
    send_through(bench.model, plain, stream, entry)
    feed = Feed.of_tokens(ids)
    (scores,) = score([PERPLEXITY], Head(bench.model, CPU, torch.float32), stream, feed)
    found = scores.perplexity
    logits = module(ids).logits[:, :-1].reshape(-1, module.config.vocab_size).double()
    loss = nn.functional.cross_entropy(logits, ids[:, 1:].reshape(-1))
    assert found == pytest.approx(math.exp(loss), rel=1e-4)


SCHEMES = pytest.mark.parametrize(
    "scheme, learned",
    [
        (FLOATING_POINT, ()),
        (W4A4, learned_by(lwc=True, let=True, let_sites=KINDS)),
        (W4A4, learned_by(lwc=True, let=True, let_sites=KINDS, let_shift="always")),
    ],
    ids=["floating point", "W4A4", "W4A4 with shifts everywhere"],
)


@SCHEMES
def test_the_materialised_model_is_the_stream_of_blocks(
    scheme, learned, variant, make_model, make_bench, token_ids
):
    bench = make_bench(make_model(variant))
    ids = token_ids(2, TOKENS)
    expected = streamed_logits(bench, ids, 2, scheme, learned)
    skeleton = bench.model.skeleton
    attention = skeleton.config._attn_implementation
    module = materialize(bench, Variant(lambda index: prepare(bench, index, scheme, learned)))
    assert hooks(skeleton) == 0 and skeleton.config._attn_implementation == attention
    found = module(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    if scheme != FLOATING_POINT:  # negative control: quantization is really there
        plain = streamed_logits(bench, ids, 2)
        assert (found - plain).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [(FLOATING_POINT, torch.float32), (W4A4, torch.float32), (W4A4, torch.bfloat16)],
    ids=["W16A16", "W4A4", "W4A4 in bfloat16"],
)
def test_the_cache_changes_nothing(scheme, dtype, variant, make_model, make_bench, token_ids):
    bench = make_bench(make_model(variant), dtype)
    module = materialize(bench, Variant(lambda index: prepare(bench, index, scheme)))
    ids = token_ids(2, TOKENS)
    whole = module(ids, use_cache=False).logits
    cache, parts = None, []
    for start, stop in ((0, 7), *((i, i + 1) for i in range(7, TOKENS))):
        step = module(ids[:, start:stop], past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        parts.append(step.logits)
    scale = float(whole.float().std())
    difference = (torch.cat(parts, 1) - whole).float().abs()
    if dtype == torch.float32:
        assert difference.max() <= 1e-4 * scale
    else:  # a code next door here and there
        assert difference.mean() <= 0.1 * scale


def test_generate_with_and_without_cache(variant, make_model, make_bench, token_ids):
    bench = make_bench(make_model(variant))
    module = materialize(bench, Variant(lambda index: prepare(bench, index, W4A4)))
    ids = token_ids(2, 6)
    found = [
        module.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=5,
            min_new_tokens=5,
            do_sample=False,
            use_cache=use_cache,
            pad_token_id=1,
        )
        for use_cache in (True, False)
    ]
    assert found[0].shape == (2, 11) and torch.equal(*found)


@pytest.mark.parametrize(
    ("vocabulary", "tokens"),
    [
        (300, 512),
        (16384, 256),
        (32000, 256),
        (49152, 128),
        (128256, 64),
        (262144, 16),
        (1 << 24, 16),
    ],
)
def test_logits_of_a_cpu_take_less_than_32_mib_at_once(vocabulary, tokens):
    assert tokens_at_once(CPU, vocabulary) == tokens
    assert tokens_at_once(torch.device("cuda"), vocabulary) == 512
