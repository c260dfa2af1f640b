"""The block view: what is frozen is what was learned, bit for bit."""

from __future__ import annotations

import itertools

import pytest
import torch

from lrquant.blocks.plan import learned_by, plan_block
from lrquant.blocks.runner import INPUT_FACTOR_SUFFIX, SHIFT_SUFFIX
from lrquant.blocks.view import BlockView
from lrquant.config.choices import KINDS
from lrquant.config.scheme import Scheme
from lrquant.config.schemes import Schemes
from lrquant.errors import LRQuantError
from lrquant.ingredients.base.statistics import ChannelStatistics
from lrquant.model.loading import from_module
from lrquant.numerics import chunks
from lrquant.numerics.grids.integer import IntegerGrid

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
BITS = pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
SYMMETRY = pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
GROUPS = pytest.mark.parametrize("group_size", [None, 16])
ROTATIONS = [("site", 1), ("linear", 1), ("none", 1), ("weight", 1), ("weight", 3)]
EVERYTHING = {
    **{"lwc": True, "let": True, "let_sites": KINDS, "let_shift": "always"},
    **{"rotation": True, "rotation_sharing": "linear"},
}


@pytest.fixture(scope="module")
def make_view(make_model):
    models = {}

    def make(name, scheme, method, dtype=torch.float32, stored=torch.float32) -> BlockView:
        if (name, stored) not in models:
            models[name, stored] = from_module(make_model(name, stored))
        model = models[name, stored]
        tensors = model.block_tensors(0, torch.device("cpu"))
        plan = plan_block(model, 0, Schemes(scheme))
        view = BlockView(tensors, plan, learned_by(**method), dtype)
        view.initialize(random_statistics(view))
        return view

    return make


def random_statistics(view: BlockView) -> ChannelStatistics:
    generator = torch.Generator().manual_seed(3)
    statistics = ChannelStatistics()
    for name, matrix in view.matrices.items():
        midpoints = torch.randn(view.weight(name).shape[1], generator=generator)
        statistics.midpoints[f"{view.plan.name}.{matrix.reads}"] = midpoints
        statistics.maxima[f"{view.plan.name}.{matrix.reads}"] = midpoints.abs() + 4
    return statistics


def perturb_(view: BlockView, seed: int = 0) -> None:
    """Move every parameter well away from its start."""
    generator = torch.Generator().manual_seed(seed)
    for name, values in view.parameters.items():
        noise = torch.randn(values.shape, generator=generator)
        positive = ".scale" in name or name.startswith("rotation.")
        view.parameters[name] = values * noise.exp() if positive else values + 2 * noise


def differing(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> list[str]:
    """Names whose tensors are not the same bits of the same dtype."""
    assert left.keys() == right.keys()

    def bits(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous().view(torch.uint8)

    return [
        name
        for name, tensor in left.items()
        if tensor.dtype != right[name].dtype or not torch.equal(bits(tensor), bits(right[name]))
    ]


def methods():
    yield {}
    yield {"lwc": True}
    for kinds in [*((kind,) for kind in KINDS), KINDS]:
        for lwc, shift in itertools.product((False, True), ("auto", "always")):
            yield {"lwc": lwc, "let": True, "let_sites": kinds, "let_shift": shift}
    for (sharing, rank), lwc, let in itertools.product(ROTATIONS, (False, True), (False, True)):
        factors = {"rotation": True, "rotation_sharing": sharing, "rotate_rank": rank}
        yield {"lwc": lwc, "let": let, "let_sites": KINDS, "let_shift": "always", **factors}


@DTYPES
@BITS
@SYMMETRY
@GROUPS
@pytest.mark.parametrize("name", ["llama", "llama-biases", "opt"])
def test_frozen_equals_learned_bit_for_bit(name, bits, dtype, symmetric, group_size, make_view):
    scheme = Scheme(bits, 16, group_size, symmetric)
    for seed, method in enumerate(methods()):
        stored = (torch.float32, torch.bfloat16)[seed % 2]
        view = make_view(name, scheme, method, dtype, stored)
        perturb_(view, seed)
        with torch.no_grad():
            learned = view.tensors()
        assert differing(view.freeze().tensors(dtype), learned) == [], method


@pytest.mark.parametrize(("sharing", "rank"), ROTATIONS)
def test_dropping_the_learned_factor_at_the_end_is_seen(sharing, rank, make_view):
    """The published code freezes without it."""
    factors = {"rotation": True, "rotation_sharing": sharing, "rotate_rank": rank}
    method = {"lwc": True, **factors}
    view = make_view("llama", Scheme(4), method)
    perturb_(view)
    with torch.no_grad():
        learned = view.tensors()
    view.parameters = {k: v for k, v in view.parameters.items() if not k.startswith("rotation.")}
    dropped = view.freeze().tensors(torch.float32)
    wrong = differing({k: v for k, v in learned.items() if k in dropped}, dropped)
    assert {f"{linear}.weight" for linear in view.matrices} <= set(wrong)


@BITS
def test_frozen_equals_learned_while_gradients_are_recorded(bits, make_view):
    view = make_view("opt", Scheme(bits), EVERYTHING)
    perturb_(view)
    for values in view.parameters.values():
        values.requires_grad_(True)
    learned = {name: tensor.detach() for name, tensor in view.tensors().items()}
    frozen = view.freeze().tensors(torch.float32)
    assert differing(frozen, learned) == []
    assert not any(tensor.requires_grad for tensor in frozen.values())


def test_frozen_equals_learned_whatever_the_chunks(make_view, monkeypatch):
    view = make_view("opt", Scheme(4, group_size=16), EVERYTHING)
    perturb_(view)
    whole = view.freeze().tensors(torch.float32)
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", 100)
    with torch.no_grad():
        assert differing(whole, view.tensors()) == []


@BITS
@pytest.mark.parametrize("name", ["llama", "llama-biases", "opt"])
def test_every_parameter_changes_the_tensors(name, bits, make_view):
    """Negative control of the equality, and no parameter is idle."""
    view = make_view(name, Scheme(bits, group_size=16), EVERYTHING)
    perturb_(view)
    frozen = view.freeze().tensors(torch.float32)
    learned = dict(view.parameters)
    assert learned
    for parameter, values in learned.items():
        view.parameters = {**learned, parameter: values + 0.5}
        with torch.no_grad():
            assert differing(frozen, view.tensors()), parameter


@DTYPES
def test_gradients_reach_every_parameter_and_no_stored_tensor(dtype, make_view):
    view = make_view("opt", Scheme(4, group_size=16), EVERYTHING, dtype)
    perturb_(view)
    for tensor in view.stored.values():
        tensor.requires_grad_(False)
    for values in view.parameters.values():
        values.requires_grad_(True)
    generator = torch.Generator().manual_seed(1)
    total = sum(
        (tensor * torch.randn(tensor.shape, generator=generator)).sum()
        for tensor in view.tensors().values()
    )
    total.backward()
    for name, values in view.parameters.items():
        assert torch.isfinite(values.grad).all() and values.grad.abs().max() > 0, name
    assert all(tensor.grad is None for tensor in view.stored.values())


@pytest.mark.parametrize("bits", [4, 16])
def test_stored_tensors_stay_as_they_are(bits, make_view):
    view = make_view("llama-biases", Scheme(bits), EVERYTHING)
    before = {name: tensor.clone() for name, tensor in view.stored.items()}
    perturb_(view)
    view.tensors()
    view.freeze()
    assert differing(before, view.stored) == []


@SYMMETRY
@GROUPS
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_in_range_and_stand_for_the_weight(bits, symmetric, group_size, make_view):
    scheme = Scheme(bits, 16, group_size, symmetric)
    view = make_view("opt", scheme, EVERYTHING)
    perturb_(view)
    frozen = view.freeze()
    assert tuple(frozen.matrices) == tuple(view.matrices)
    code_min, code_max = IntegerGrid(bits, group_size, symmetric).code_range
    for name, linear in frozen.matrices.items():
        rows, columns = view.stored[f"{name}.weight"].shape
        size = group_size or columns
        assert linear.codes.dtype == (torch.int8 if symmetric else torch.uint8)
        assert linear.codes.shape == (rows, columns)
        assert code_min <= linear.codes.min() and linear.codes.max() <= code_max
        assert linear.scale.shape == linear.zero_point.shape == (rows, columns // size)
        assert linear.scale.dtype == linear.zero_point.dtype == torch.float32
        assert linear.scale.min() > 0
        assert code_min <= linear.zero_point.min() and linear.zero_point.max() <= code_max
        assert torch.equal(linear.zero_point, linear.zero_point.round())
        assert not symmetric or not linear.zero_point.any()
        assert linear.grid == IntegerGrid(bits, group_size, symmetric)
        assert linear.scheme == scheme
        assert linear.bias.dtype == torch.float32 and linear.bias.shape == (rows,)
        scale, zero_point = (
            values.repeat_interleave(size, 1) for values in (linear.scale, linear.zero_point)
        )
        weight = scale * (linear.codes.float() - zero_point)
        assert torch.equal(linear.dequantize(torch.float32), weight)
        assert torch.equal(linear.dequantize(torch.bfloat16), weight.bfloat16())


def test_every_code_is_used_somewhere(make_view):
    """Negative control of the range: it is not wider than the bits allow, nor narrower."""
    for symmetric in (False, True):
        frozen = make_view("opt", Scheme(3, symmetric=symmetric), {}).freeze()
        codes = torch.cat([linear.codes.flatten() for linear in frozen.matrices.values()])
        code_min, code_max = IntegerGrid(3, None, symmetric).code_range
        assert codes.unique().tolist() == list(range(code_min, code_max + 1))


def test_floating_point_weights_are_only_scaled(make_view):
    view = make_view("opt", Scheme(16, 4), {})
    assert view.freeze().matrices == {}
    plain = {name: tensor.float() for name, tensor in view.stored.items()}
    assert differing(view.tensors(), plain) == []
    assert not make_view("opt", Scheme(16, 4), {"lwc": True}).parameters


def test_start_of_learning(make_view):
    published = {**EVERYTHING, "lwc_init": 4.0}
    view = make_view("opt", Scheme(4, group_size=16), published)
    clipping = {name: v for name, v in view.parameters.items() if name.startswith("lwc.")}
    assert clipping.keys() == {
        f"lwc.{linear}.{side}" for linear in view.matrices for side in ("upper", "lower")
    }
    for name, values in clipping.items():
        linear = name.split(".", 1)[1].rpartition(".")[0]
        rows, columns = view.stored[f"{linear}.weight"].shape
        assert torch.equal(values, torch.full((rows, columns // 16), 4.0))
    searched = make_view("opt", Scheme(4, group_size=16), EVERYTHING).parameters
    assert not all(torch.equal(searched[name], values) for name, values in clipping.items())
    for linear in view.matrices:
        sides = (searched[f"lwc.{linear}.{side}"] for side in ("upper", "lower"))
        assert torch.equal(*sides), "one logit for both"


def test_load_takes_parameters_learned_earlier(make_view):
    first = make_view("opt", Scheme(4), EVERYTHING)
    perturb_(first)
    second = make_view("opt", Scheme(4), EVERYTHING)
    second.load(first.parameters)
    with torch.no_grad():
        assert differing(first.tensors(), second.tensors()) == []


@pytest.mark.parametrize(
    "name, rule, shifted, through_norms",
    [
        ("llama", "auto", [], []),
        ("llama", "never", [], []),
        (
            "llama",
            "always",
            ["input_layernorm", "post_attention_layernorm", "self_attn.o_proj"],
            ["input_layernorm", "post_attention_layernorm"],
        ),
        ("llama-biases", "auto", ["self_attn.o_proj"], []),
        ("qwen2", "auto", [], []),  # o_proj has no bias
        ("opt", "auto", ["final_layer_norm", "self_attn.out_proj", "self_attn_layer_norm"], []),
        ("opt", "never", [], []),
        ("opt-no-biases", "auto", [], []),
        (
            "opt-no-biases",
            "always",
            ["final_layer_norm", "self_attn.out_proj", "self_attn_layer_norm"],
            [],
        ),
    ],
)
def test_where_shifts_are_learned(name, rule, shifted, through_norms, make_view):
    view = make_view(name, Scheme(4), {"let": True, "let_sites": KINDS, "let_shift": rule})
    (let,) = view.ingredients
    sites = let.sites(view.shapes)
    assert sorted(site.name for site in sites if let.shifts(site, view.shapes)) == shifted
    assert sorted(view.shifted_norms) == through_norms
    learned = [p for p in view.parameters if p.endswith(".shift")]
    assert sorted(learned) == [f"let.{site}.shift" for site in shifted]
    extra = {n for n in view.tensors() if n.endswith(SHIFT_SUFFIX)}
    assert extra == {norm + SHIFT_SUFFIX for norm in through_norms}


def test_no_tensor_is_added_where_shifts_need_a_bias_that_exists(variant, make_view):
    view = make_view(variant, Scheme(4), {"lwc": True, "let": True, "let_sites": KINDS})
    assert view.tensors().keys() == view.stored.keys()


def test_only_the_chosen_sites_are_learned(make_view):
    for kind in KINDS:
        view = make_view("opt", Scheme(4), {"let": True, "let_sites": (kind,)})
        kinds = {site.name: site.kind for site in view.plan.sites}
        named = {name.removeprefix("let.").rpartition(".")[0] for name in view.parameters}
        assert {kinds[name] for name in named} == {kind}
    assert not make_view("opt", Scheme(4), {"let_sites": KINDS}).parameters


def test_scales_are_kept_from_zero_and_nothing_else(make_view):
    view = make_view("opt", Scheme(4), {"lwc": True, "let": True})
    for values in view.parameters.values():
        values.sub_(values.mean()).clamp_(-3, 3)
    before = {name: values.clone() for name, values in view.parameters.items()}
    view.constrain_()
    for name, values in view.parameters.items():
        expected = before[name].clamp(min=0.01) if name.endswith(".scale") else before[name]
        assert torch.equal(values, expected), name


@pytest.mark.parametrize("bits", [4, 16])
def test_a_plain_block_holds_the_input_factors_in_its_weights(bits, make_view):
    view = make_view("llama", Scheme(bits), {"rotation": True, "rotation_sharing": "linear"})
    perturb_(view)
    tensors, dense = view.freeze().tensors(torch.float32), view.freeze().dense()
    assert not any(name.endswith(INPUT_FACTOR_SUFFIX) for name in dense)
    for linear in view.matrices:
        weight = tensors[f"{linear}.weight"]
        factor = tensors.get(linear + INPUT_FACTOR_SUFFIX, torch.ones(weight.shape[1]))
        assert torch.equal(dense[f"{linear}.weight"], weight * factor)


def test_a_group_size_that_does_not_divide_is_refused(make_view):
    with pytest.raises(LRQuantError) as caught:
        make_view("llama", Scheme(4, group_size=24), {}).tensors()
    message = str(caught.value)
    assert "group size 24 does not divide the 32 input columns of self_attn.q_proj" in message
    assert message.endswith("sizes that do: 16, 32")


@pytest.mark.parametrize(("sharing", "rank"), ROTATIONS)
@pytest.mark.parametrize("name", ["llama", "opt", "gemma3"])
def test_parameters_have_the_shapes_that_are_expected(make_view, name, sharing, rank):
    for method in ({}, *methods(), {**EVERYTHING, "let_shift": "auto"}):
        method = {**method, "rotation_sharing": sharing, "rotate_rank": rank}
        for scheme in (Scheme(4, 4, group_size=16), Scheme(16, 4)):
            view = make_view(name, scheme, method)
            shapes = {name: tuple(values.shape) for name, values in view.parameters.items()}
            assert shapes == view.parameter_shapes()


def test_parameters_of_another_block_are_refused(make_view):
    view = make_view("llama", Scheme(4, 4), {"lwc": True})
    own = dict(view.parameters)
    name = "lwc.mlp.down_proj.upper"
    for other, said in (
        (own | {name: own[name][:-1]}, r"down_proj\.upper is of shape \(31, 1\) where"),
        (own | {"lwc.x": own[name]}, r"lwc\.x is of shape \(32, 1\) where .* missing"),
        ({key: value for key, value in own.items() if key != name}, "upper is missing where"),
    ):
        with pytest.raises(LRQuantError, match=said):
            view.load(other)
