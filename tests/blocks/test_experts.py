"""Experts through the interface of transformers: equal to its eager ones, on grids, told of."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lrquant.blocks.experts import NAME, ExpertModules, Inside, experts_forward, rows_forward
from lrquant.blocks.inputs import BlockInputs
from lrquant.blocks.plan import Plan
from lrquant.blocks.workbench import Workbench, advance_full_precision
from lrquant.config.scheme import FLOATING_POINT, Scheme
from lrquant.config.schemes import Schemes
from lrquant.ingredients.base.statistics import ChannelStatistics

CPU = torch.device("cpu")
FAMILIES = pytest.mark.parametrize("name", ["qwen3_moe", "qwen2_moe", "olmoe", "mixtral"])
DOWN = "mlp.experts.{}.down_proj"


def experts_of(model: nn.Module) -> nn.Module:
    return model.model.layers[-1].mlp.experts


def routed(count: int, tokens: int = 9, dtype: torch.dtype = torch.float64):
    """Tokens (tokens, 32), two experts of each, and how much they count; the last gets none."""
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(tokens, 32, generator=generator, dtype=dtype)
    chosen = torch.rand(tokens, count - 1, generator=generator).argsort(1)[:, :2]
    return values, chosen, torch.rand(tokens, 2, generator=generator, dtype=dtype)


@FAMILIES
def test_they_are_equal_to_transformers_own(name, make_model):
    """In float64; with nothing done inside, and seen if something is."""
    module = experts_of(make_model(name, torch.float64))
    arguments = routed(len(module.down_proj))
    expected = module(*arguments)
    setattr(module, "_lrquant_inside", Inside({}, lambda place, values: values))  # noqa: B010
    torch.testing.assert_close(experts_forward(module, *arguments), expected, rtol=0, atol=1e-12)
    halved = Inside({0: DOWN.format(0)}, lambda place, values: values / 2)
    setattr(module, "_lrquant_inside", halved)  # noqa: B010
    assert (experts_forward(module, *arguments) - expected).abs().max() > 1e-3
    values, chosen, weights = arguments
    swapped = experts_forward(module, values, chosen.flip(1), weights)
    assert (swapped - expected).abs().max() > 1e-3


def test_what_is_told_is_what_each_expert_would_read(make_model):
    module = experts_of(make_model("qwen3_moe", torch.float64))
    values, chosen, weights = routed(len(module.down_proj))
    told, seen, routes = {}, {}, []

    def read(place, states):
        seen[place] = states
        return states

    places = {expert: DOWN.format(expert) for expert in range(4)}
    inside = Inside(places, read, lambda n, v: told.update({n: v}), routes.append)
    setattr(module, "_lrquant_inside", inside)  # noqa: B010
    experts_forward(module, values, chosen, weights)
    assert routes == [chosen] and told.keys() == set(places.values())
    assert seen.keys() == told.keys() - {DOWN.format(3)}, "the last is no token's"
    for expert, place in places.items():
        gate, up = (values @ module.gate_up_proj[expert].T).chunk(2, -1)
        torch.testing.assert_close(told[place], nn.functional.silu(gate) * up)
        own = (chosen == expert).any(1)
        torch.testing.assert_close(seen.get(place, values[:0, :16]), told[place][own])


def test_the_gradient_is_that_of_transformers_own(make_model):
    module = experts_of(make_model("qwen2_moe", torch.float64))
    arguments = routed(len(module.down_proj))
    gradients = []
    setattr(module, "_lrquant_inside", Inside({}, lambda place, values: values))  # noqa: B010
    for forward in (type(module).forward, experts_forward):
        module.zero_grad()
        module.requires_grad_(True)
        forward(module, *arguments).square().sum().backward()
        gradients.append([each.grad.clone() for each in module.parameters()])
    for own, other in zip(*gradients, strict=True):
        torch.testing.assert_close(own, other)
        assert not own[3].any() and own[0].any()


def in_rows(count: int) -> torch.Tensor:
    """Rows (experts * tokens, 32) of tokens as a model gives them to such experts."""
    values, chosen, weights = routed(count)
    scores = torch.zeros(len(values), count, dtype=values.dtype).scatter(1, chosen, weights)
    return (values * scores.T[..., None]).flatten(0, 1)


@pytest.fixture
def by_rows(make_model):
    return make_model("llama4-two", torch.float64).model.layers[0].feed_forward.experts


def test_experts_in_rows_are_equal_to_transformers_own(by_rows):
    """In float64, with their gradients; and seen if something is done inside."""
    gradients, outputs, rows = [], [], in_rows(4).requires_grad_(True)
    setattr(by_rows, "_lrquant_inside", Inside({}, lambda place, values: values))  # noqa: B010
    by_rows.requires_grad_(True)
    for forward in (type(by_rows).forward, rows_forward):
        by_rows.zero_grad()
        outputs.append(forward(by_rows, rows))
        outputs[-1].square().sum().backward()
        gradients.append([each.grad.clone() for each in by_rows.parameters()])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-12)
    for own, other in zip(*gradients, strict=True):
        torch.testing.assert_close(own, other)
    for place in (DOWN.format(0), "mlp.experts"):
        read = lambda name, values, place=place: values / 2 if name == place else values  # noqa: E731
        setattr(by_rows, "_lrquant_inside", Inside({0: DOWN.format(0)}, read, name="mlp.experts"))  # noqa: B010
        assert (rows_forward(by_rows, rows) - outputs[0]).abs().max() > 1e-3


def test_what_is_told_of_experts_in_rows_is_what_each_would_read(by_rows):
    """With the score that a token has where it goes; which is the first of several."""
    told, read, routes, rows = {}, [], [], in_rows(4)
    inside = Inside(
        {expert: DOWN.format(expert) for expert in range(4)},
        lambda name, values: read.append(name) or values,
        lambda name, values: told.update({name: values}),
        routes.append,
        "mlp.experts",
    )
    setattr(by_rows, "_lrquant_inside", inside)  # noqa: B010
    rows_forward(by_rows, rows)
    _, chosen, _ = routed(4)
    assert torch.equal(routes[0].sort(1).values, chosen.sort(1).values)
    own = rows.unflatten(0, (4, -1))[chosen.amin(1), torch.arange(9)]
    assert torch.equal(told["mlp.experts"], own) and read.count("mlp.experts") == 5
    for expert in range(4):
        gate, up = (own @ by_rows.gate_up_proj[expert]).chunk(2, -1)
        torch.testing.assert_close(told[DOWN.format(expert)], nn.functional.silu(gate) * up)
    assert DOWN.format(3) not in read, "the last is no token's"


def entered(bench: Workbench, ids: torch.Tensor):
    entry = BlockInputs(bench.model, ids, len(ids), CPU)
    (stream,) = bench.streams(entry, 1)
    entry.embed(stream)
    return entry, stream


def test_what_each_reads_lies_on_its_grid(make_model, make_bench, token_ids):
    """Three bits: at most eight values a token, before the first matrix and before the second."""
    plan = Plan(Schemes(Scheme(16, 3, qkv_bits=16)))
    bench = make_bench(make_model("qwen3_moe"), plan=plan)
    entry, stream = entered(bench, token_ids(2, 12))
    view, read, told = bench.view(0, bench.stored(0)), {}, {}
    runner = bench.runner(0, view, lambda name, values: told.update({name: values}))
    with runner:
        inside = runner._read
        runner._read = lambda name, values: read.setdefault(name, inside(name, values))
        runner(view.tensors(), stream.read(entry.batches[0]), entry.arguments(0, 0))
    downs = [name for name in read if name.endswith("down_proj")]
    assert downs and "mlp.experts" in read and told.keys().isdisjoint(downs)
    for name in (*downs, "mlp.experts"):
        assert max(len(token.unique()) for token in read[name].flatten(0, -2)) <= 8
    assert told["mlp.experts"].shape == (2, 12, 32), "by sample and token"


def test_what_experts_in_rows_read_lies_on_its_grid(make_model, make_bench, token_ids):
    plan = Plan(Schemes(Scheme(16, 3, qkv_bits=16)))
    bench = make_bench(make_model("llama4-two"), plan=plan)
    entry, stream = entered(bench, token_ids(2, 12))
    view, read, told = bench.view(0, bench.stored(0)), {}, {}
    module = bench.model.blocks[0].feed_forward.experts
    hooked = module.forward = lambda states: states
    observer = lambda name, values: told.update({name: values})  # noqa: E731
    with bench.runner(0, view, observer) as runner:
        inside = runner._read
        runner._read = lambda name, values: read.setdefault(name, inside(name, values))
        runner(view.tensors(), stream.read(entry.batches[0]), entry.arguments(0, 0))
    downs = [name for name in read if ".experts." in name]
    assert downs and len(read["feed_forward.experts"]) == 2 * 24, "rows of chosen experts alone"
    for name in (*downs, "feed_forward.experts"):
        assert max(len(token.unique()) for token in read[name]) <= 8
    assert told["feed_forward.experts"].shape == (2, 12, 32), "by sample and token"
    assert told.keys().isdisjoint(downs), "of a few tokens each"
    assert vars(module)["forward"] is hooked and "_lrquant_inside" not in vars(module)


def test_statistics_are_of_every_token_through_every_expert(make_model, make_bench, token_ids):
    model = make_model("qwen3_moe")
    bench = make_bench(model, plan=Plan(Schemes(FLOATING_POINT)))
    entry, stream = entered(bench, token_ids(2, 12))
    statistics, normed = ChannelStatistics(), []
    handle = bench.model.blocks[0].post_attention_layernorm.register_forward_hook(
        lambda module, inputs, output: normed.append(output)
    )
    into = bench.streams(entry, 1)[0]
    advance_full_precision(bench, 0, bench.stored(0), entry, stream, into, statistics.observe)
    handle.remove()
    experts = model.model.layers[0].mlp.experts
    for expert in range(4):
        gate, up = (normed[0] @ experts.gate_up_proj[expert].T).chunk(2, -1)
        values = (nn.functional.silu(gate) * up).flatten(0, 1)
        own = f"model.layers.0.{DOWN.format(expert)}"
        torch.testing.assert_close(statistics.maxima[own], values.abs().amax(0))
        assert statistics.samples[own] == 2


@pytest.mark.parametrize("fails", [False, True], ids=["normal exit", "exception"])
def test_nothing_is_left_behind(fails, make_model, make_bench, token_ids):
    bench = make_bench(make_model("qwen3_moe"))
    entry, stream = entered(bench, token_ids(1, 12))
    config, module = bench.model.skeleton.config, bench.model.blocks[0].mlp.experts
    before, view = config._experts_implementation, bench.view(0, bench.stored(0))
    states = stream.read(entry.batches[0])
    try:
        with bench.runner(0, view) as runner:
            runner(view.tensors(), states[..., :-1] if fails else states, entry.arguments(0, 0))
    except RuntimeError:
        assert fails
    assert config._experts_implementation == before != NAME
    assert not hasattr(module, "_lrquant_inside")


def test_names_inside_are_told_from_those_of_modules(make_bench, make_model):
    modules = ExpertModules.of(make_bench(make_model("qwen2_moe")).model.blocks[0])
    readers = ("mlp.experts", DOWN.format(2), "mlp.shared_expert.down_proj", "self_attn.q_proj")
    assert modules.places(readers) == {"mlp.experts": {2: DOWN.format(2)}}


def test_a_gradient_takes_no_more_than_the_weights_for_each_expert(make_model):
    """One expert's slice, alone, would bring a gradient of the size of all: here they share one."""
    module = experts_of(make_model("qwen3_moe", torch.float64))
    setattr(module, "_lrquant_inside", Inside({}, lambda place, values: values))  # noqa: B010
    module.requires_grad_(True)
    output = experts_forward(module, *routed(4))
    taken, waiting = [], [output.grad_fn]
    while waiting:
        node = waiting.pop()
        taken.append(type(node).__name__)
        waiting += [each for each, _ in node.next_functions if each is not None]
    assert "UnbindBackward0" in taken and "SelectBackward0" not in taken
