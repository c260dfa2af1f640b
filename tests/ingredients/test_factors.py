"""LRQuant+'s factors: the identity at the start, the published equation, where each form acts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lrquant.blocks.inputs import BlockInputs
from lrquant.blocks.plan import learned_by, plan_block
from lrquant.blocks.runner import INPUT_FACTOR_SUFFIX
from lrquant.blocks.view import BlockView
from lrquant.config.scheme import Scheme
from lrquant.config.schemes import Schemes
from lrquant.ingredients.base.block import BlockShapes, MatrixShape, Start
from lrquant.ingredients.base.folding import Factors
from lrquant.ingredients.base.statistics import ChannelStatistics
from lrquant.ingredients.factors import SHARINGS, ScaleFactors
from lrquant.model.loading import from_module
from lrquant.numerics.grids.integer import IntegerGrid
from lrquant.numerics.tokens import fake_quantize_tokens

CPU = torch.device("cpu")
FORMS = [*((sharing, 1) for sharing in SHARINGS), ("weight", 2), ("weight", 5)]


def make_view(module, sharing, rank=1, scheme=None) -> BlockView:
    model, scheme = from_module(module), scheme or Scheme(4)
    if model.architecture.own_attention:
        scheme = replace(scheme, qkv_bits=16)
    learned = learned_by(rotation=True, rotation_sharing=sharing, rotate_rank=rank)
    plan = plan_block(model, 0, Schemes(scheme))
    view = BlockView(model.block_tensors(0, CPU), plan, learned, torch.float32)
    view.initialize(ChannelStatistics())
    return view


def norm_sites(view: BlockView):
    """The sites whose input factor is folded into a norm."""
    (factors,) = view.ingredients
    return factors.sites(view.shapes)


def move_(view: BlockView, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, values in view.parameters.items():
        view.parameters[name] = values + 0.3 * torch.randn(values.shape, generator=generator)


def dense_start(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """r1 and r2 of a matrix of (6, 20)."""
    factors = ScaleFactors(rotation=True, rotation_sharing="weight", rotate_rank=rank)
    shape = MatrixShape(6, 20, IntegerGrid(4), "q", True)
    block = BlockShapes({"q": shape}, (), frozenset(), CPU)
    start = Start("block", ChannelStatistics(), lambda name: torch.empty(6, 20), Factors())
    parameters = factors.start(block, start)
    return parameters["rotation.q.output"], parameters["rotation.q.input"]


@pytest.mark.parametrize("rank", [1, 2, 3, 8])
def test_the_dense_factor_starts_at_exactly_one(rank):
    first, second = dense_start(rank)
    assert first.shape == (6, rank) and second.shape == (rank, 20)
    assert torch.equal(first @ second, torch.ones(6, 20))


def test_no_two_ranks_start_with_the_same_gradient():
    """Equal rows of r2 would stay equal: rank k would learn no more than rank 2."""
    second = dense_start(4)[1].double()
    products = second @ second.T
    assert torch.allclose(products, products.diag().diag(), atol=1e-5)


@pytest.mark.parametrize(("sharing", "rank"), FORMS)
@pytest.mark.parametrize("scheme", [Scheme(3), Scheme(4, 4), Scheme(2, 16, 16, True)])
def test_the_start_changes_nothing(make_model, variant, sharing, rank, scheme):
    module = make_model(variant)
    plain = make_view(module, "none", scheme=scheme)
    plain.parameters = {}
    found, expected = make_view(module, sharing, rank, scheme).tensors(), plain.tensors()
    for name, tensor in found.items():
        if name.endswith(INPUT_FACTOR_SUFFIX):
            assert torch.equal(tensor, torch.ones_like(tensor))
        else:
            assert torch.equal(tensor, expected[name]), name


def test_factors_of_several_ingredients_multiply(make_model):
    view = make_view(make_model("llama"), "linear", 1, Scheme(4, 8))
    move_(view)
    name = f"mlp.down_proj{INPUT_FACTOR_SUFFIX}"
    once = view.tensors()[name]
    view.ingredients = view.ingredients * 2
    assert torch.equal(view.tensors()[name], once * once)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("scheme", [Scheme(4), Scheme(3, 16, 16)])
def test_the_published_form_multiplies_the_dequantised_weight(make_model, rank, scheme):
    view = make_view(make_model("llama"), "weight", rank, scheme)
    plain = view.tensors()
    move_(view)
    moved = view.tensors()
    for linear in view.matrices:
        first = view.parameters[f"rotation.{linear}.output"]
        second = view.parameters[f"rotation.{linear}.input"]
        expected = plain[f"{linear}.weight"] * (first @ second)
        assert torch.equal(moved[f"{linear}.weight"], expected), linear


@pytest.mark.parametrize("group_size", [None, 16])
def test_r1_scales_rows_and_groups_and_no_bias(make_model, group_size):
    view = make_view(make_model("llama-biases"), "none", scheme=Scheme(3, 16, group_size))
    before, codes = view.tensors(), view.freeze().matrices
    move_(view)
    after, moved = view.tensors(), view.freeze().matrices
    for linear in view.matrices:
        gain = view.parameters[f"rotation.{linear}.output"]
        rows, columns = view.stored[f"{linear}.weight"].shape
        assert gain.shape == (rows, columns // (group_size or columns))
        spread = gain.repeat_interleave(columns // gain.shape[1], 1)
        expected = before[f"{linear}.weight"] * spread
        assert torch.allclose(after[f"{linear}.weight"], expected, rtol=1e-6), linear
        assert torch.equal(after[f"{linear}.bias"], before[f"{linear}.bias"])
        assert torch.equal(moved[linear].codes, codes[linear].codes)
        assert torch.allclose(moved[linear].scale, codes[linear].scale * gain)


@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("bits", [4, 16])
def test_the_shared_input_factor_is_the_linears_own_when_all_are_equal(
    make_model, make_bench, token_ids, name, bits
):
    """Folded into the norm, it acts on what the quantizer reads, and costs nothing at run time."""
    module, scheme = make_model(name), Scheme(4, bits)
    shared, own = (
        make_view(module, "site", scheme=scheme),
        make_view(module, "linear", scheme=scheme),
    )
    generator = torch.Generator().manual_seed(4)
    for site in norm_sites(shared):
        factor = torch.rand(site.size, generator=generator) + 0.5
        shared.parameters[f"rotation.{site.name}.input"] = factor
        for consumer in site.consumers:
            own.parameters[f"rotation.{consumer.module}.input"] = factor
    assert len(norm_sites(shared)) == 2
    assert not any(key.endswith(INPUT_FACTOR_SUFFIX) for key in shared.tensors())
    bench = make_bench(module)
    entry = BlockInputs(bench.model, token_ids(2, 12), 2, CPU)
    (stream,) = bench.streams(entry, 1)
    entry.embed(stream)
    outputs = []
    for view in (shared, own):
        with bench.runner(0, view) as runner:
            states = stream.read(entry.batches[0])
            outputs.append(runner(view.tensors(), states, entry.arguments(0, 0)))
    # a borderline activation may take the neighbouring code: rounding of x * g before or after
    assert (outputs[0] - outputs[1]).abs().mean() < 1e-3 * outputs[0].abs().mean()
    own.parameters[f"rotation.{next(iter(own.matrices))}.input"] *= 1.5
    with bench.runner(0, own) as runner:
        other = runner(own.tensors(), stream.read(entry.batches[0]), entry.arguments(0, 0))
    assert (other - outputs[0]).abs().mean() > 1e-2 * outputs[0].abs().mean()


@pytest.mark.parametrize("bits", [4, 16])
def test_a_linear_s_own_factor_acts_before_the_quantizer(make_model, make_bench, token_ids, bits):
    """``r1 * Q(x * r2) W^T``: what a hook on a plain linear computes by hand."""
    module = make_model("llama")
    view = make_view(module, "linear", scheme=Scheme(4, bits))
    move_(view)
    bench, name = make_bench(module), "mlp.down_proj"
    entry = BlockInputs(bench.model, token_ids(1, 12), 1, CPU)
    (stream,) = bench.streams(entry, 1)
    entry.embed(stream)
    seen = {}
    with bench.runner(0, view, lambda linear, values: seen.setdefault(linear, values)) as runner:
        linear = runner.block.get_submodule(name)
        handle = linear.register_forward_hook(lambda m, i, output: seen.update(output=output))
        runner(view.tensors(), stream.read(entry.batches[0]), entry.arguments(0, 0))
        handle.remove()
    values = seen[name] * view.parameters[f"rotation.{name}.input"]
    values = values if bits == 16 else fake_quantize_tokens(values, IntegerGrid(bits))
    frozen = view.freeze().matrices[name]
    plain = frozen.dequantize(torch.float32) / view.parameters[f"rotation.{name}.output"]
    expected = (values @ plain.T) * view.parameters[f"rotation.{name}.output"].T
    assert torch.allclose(seen["output"], expected, atol=1e-5)


def test_where_there_is_no_norm_to_fold_into_the_input_side_is_left_out(make_model, variant):
    view = make_view(make_model(variant), "site")
    inputs = {name for name in view.parameters if name.endswith(".input")}
    norms = {site.name for site in norm_sites(view)}
    assert inputs == {f"rotation.{name}.input" for name in norms}
    if variant in ("llama", "opt", "opt-bare", "olmo2"):
        assert len(norms) == (2 if variant in ("llama", "opt") else 0)
    outputs = {name for name in view.parameters if name.endswith(".output")}
    assert outputs == {f"rotation.{linear}.output" for linear in view.matrices}


@pytest.mark.parametrize("sharing", ["site", "linear", "none"])
def test_factors_that_fold_stay_positive_and_the_published_one_is_free(make_model, sharing):
    for form, smallest in ((sharing, 0.01), ("weight", -2.0)):
        view = make_view(make_model("llama"), form)
        for values in view.parameters.values():
            values.fill_(-2.0)
        view.constrain_()
        assert all(float(v.min()) == pytest.approx(smallest) for v in view.parameters.values())
