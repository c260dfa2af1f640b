"""Experts whose weights go through their grid at once: the same bits as one by one."""

from __future__ import annotations

import pytest
import torch

from lrquant.blocks import together, view
from lrquant.blocks.plan import Plan, learned_by
from lrquant.config.scheme import Scheme
from lrquant.config.schemes import Schemes
from lrquant.numerics.recipe import Recipe

METHODS = {
    "clipping": {"lwc": True},
    "all of a row": {"lwc": True, "rotation": True, "rounding": True},
    "nothing": {},
    "columns too": {"lwc": True, "let": True},
    "dense": {"lwc": True, "rotation": True, "rotate_rank": 2, "rotation_sharing": "weight"},
}
TOGETHER = ("clipping", "all of a row", "nothing")


@pytest.fixture
def calls(monkeypatch):
    """Shapes of the weights that went through a grid."""
    seen = []
    quantize = together.fake_quantize_weight
    monkeypatch.setattr(
        together,
        "fake_quantize_weight",
        lambda weight, *rest, **more: seen.append(weight.shape) or quantize(weight, *rest, **more),
    )
    return seen


def made(bench, dtype=torch.float32):
    """A block's weights under parameters that are no start, and gradients to all of these."""
    own = bench.view(0, bench.stored(0))
    generator = torch.Generator().manual_seed(4)
    own.parameters = {
        name: (0.5 + 0.4 * torch.rand(shape, generator=generator)).requires_grad_(True)
        for name, shape in own.parameter_shapes().items()
    }
    tensors = own.tensors()
    outputs = [each for each in tensors.values() if each.requires_grad]
    if outputs:
        gradients = [torch.randn(each.shape, generator=generator).to(each) for each in outputs]
        torch.autograd.backward(outputs, gradients)
    return tensors, {name: each.grad for name, each in own.parameters.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["W3A16g16", "W4A4", "W8A16-sym"])
@pytest.mark.parametrize("method", METHODS)
def test_at_once_or_one_by_one(make_bench, make_model, monkeypatch, calls, method, scheme, dtype):
    plan = Plan(Schemes(Scheme.parse(scheme)), learned_by(**METHODS[method]))
    bench = make_bench(make_model("qwen3_moe"), dtype, plan)
    monkeypatch.setattr(together, "MOST", 2 * 32 * 32)  # two experts' first matrices
    tensors, gradients = made(bench)
    several = [shape for shape in calls if shape[0] in (64, 128)]
    assert (len(several) == 3) == (method in TOGETHER), calls
    monkeypatch.setattr(view.BlockView, "_together", lambda self, factors: {})
    others, other_gradients = made(bench)
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name
    for name, gradient in gradients.items():
        both = gradient, other_gradients[name]
        assert (both[0] is None) == (both[1] is None)
        assert gradient is None or torch.equal(*both), name


def test_what_is_not_by_row_is_not_put_together():
    ones = torch.ones(2)
    assert Recipe.stacked([Recipe(rows=ones), Recipe(columns=ones)]) is None
    assert Recipe.stacked([Recipe(dense=(ones, ones))]) is None
    assert Recipe.stacked([Recipe(rows=ones), Recipe()]) is None, "one has none"
    both = Recipe.stacked([Recipe(rows=ones), Recipe(rows=2 * ones)])
    assert both is not None and both.rows is not None and both.rows.tolist() == [1, 1, 2, 2]


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_other_layouts_and_grids_are_made_one_by_one(make_bench, make_model, family):
    """Inputs first, or one expert on another grid."""
    schemes = Schemes(
        Scheme.parse("W3A16g16"), (("experts.1.down_proj", Scheme.parse("W8A16g16")),)
    )
    bench = make_bench(make_model(family), plan=Plan(schemes, learned_by(lwc=True)))
    own = bench.view(0, bench.stored(0))
    expected = set() if family == "gpt_oss" else {"mlp.experts.gate_up_proj"}
    assert own._batches.keys() == expected
