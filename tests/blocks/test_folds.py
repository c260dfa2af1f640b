"""Folds of a block of any make: parts of fused linears, modules that are kept, shifts alone."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch.nn.functional import layer_norm, linear

from lrquant.architectures.matrix import experts, fused_linear, linears
from lrquant.architectures.sites import norm_site, value_output_site
from lrquant.blocks.plan import BlockPlan, learned_by
from lrquant.blocks.runner import SHIFT_SUFFIX
from lrquant.blocks.view import BlockView
from lrquant.config.scheme import FLOATING_POINT, Scheme
from lrquant.ingredients.base.folding import Factors
from lrquant.ingredients.ingredient import Ingredient, Parameters

HIDDEN, READERS = 8, ("up", "router")
NORM = norm_site("norm", READERS, HIDDEN)
EVERYWHERE = {"let": True, "let_sites": ("norm", "value_output"), "let_shift": "always"}
W4A16 = Scheme(4, 16)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def view_of(stored, matrices, sites, ingredients, scheme=FLOATING_POINT) -> BlockView:
    by_name = {matrix.name: matrix for matrix in matrices}
    plan = BlockPlan("block", by_name, sites, dict.fromkeys(by_name, scheme))
    return BlockView(stored, plan, ingredients, torch.float32)


def set_(view: BlockView) -> None:
    """Random positive scales, random shifts."""
    for seed, (name, shape) in enumerate(view.parameter_shapes().items()):
        values = random(*shape, seed=seed)
        view.parameters[name] = values if name.endswith("shift") else values.exp()


@dataclass(frozen=True)
class Shifts(Ingredient):
    """A shift of a norm's output and no scale, by names of its own."""

    name = "moved"
    switch = "moved"

    def shapes(self, block) -> dict[str, tuple[int, ...]]:
        return {"moved.norm.by": (HIDDEN,)}

    def fold(self, block, parameters: Parameters, factors: Factors) -> None:
        (site,) = block.sites
        factors.subtract[site.producer.module] = parameters["moved.norm.by"]
        for fold in site.consumers:
            factors.add[fold.module] = parameters["moved.norm.by"]


INGREDIENTS = {
    "scales and shifts": learned_by(**EVERYWHERE),
    "scales": learned_by(**{**EVERYWHERE, "let_shift": "never"}),
    "shifts alone": (Shifts(),),
}


def norm_block(norm_bias: bool) -> dict[str, torch.Tensor]:
    """A norm that a matrix and a router, which is kept, read."""
    stored = {"norm.weight": random(HIDDEN, seed=1), "norm.bias": random(HIDDEN, seed=2)}
    for seed, name in enumerate(READERS):
        stored[f"{name}.weight"] = random(6, HIDDEN, seed=3 + seed)
        stored[f"{name}.bias"] = random(6, seed=5 + seed)
    return stored if norm_bias else {n: t for n, t in stored.items() if n != "norm.bias"}


def read_by(tensors) -> dict[str, torch.Tensor]:
    """What each reader makes of a normalised input."""
    normed = layer_norm(random(4, HIDDEN, seed=9), (HIDDEN,), tensors["norm.weight"])
    normed = normed + tensors.get("norm.bias", 0.0) + tensors.get("norm" + SHIFT_SUFFIX, 0.0)
    return {n: linear(normed, tensors[f"{n}.weight"], tensors[f"{n}.bias"]) for n in READERS}


@pytest.mark.parametrize("norm_bias", [False, True])
@pytest.mark.parametrize("learned", INGREDIENTS)
def test_folds_into_a_norm_hold_for_all_that_read_it(learned, norm_bias):
    stored = norm_block(norm_bias)
    view = view_of(stored, linears("up"), (NORM,), INGREDIENTS[learned])
    set_(view)
    tensors = view.tensors()
    assert not torch.equal(tensors["router.weight"], stored["router.weight"]) or (
        learned == "shifts alone"
    )
    expected, found = read_by(stored), read_by(tensors)
    for name in READERS:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4)
    changed = [name for name in tensors if name.startswith("router.")]
    for name in changed:  # negative control: a router that is not folded into would be seen
        wrong = read_by({**tensors, name: stored[name]})["router"]
        same = torch.equal(tensors[name], stored[name])
        assert torch.allclose(wrong, expected["router"], atol=1e-2) == same


@pytest.mark.parametrize("norm_bias", [False, True])
@pytest.mark.parametrize("learned", INGREDIENTS)
def test_norms_to_shift_are_told_before_anything_is_learned(learned, norm_bias):
    """Whoever shifts them: the runner is made by what is asked for, not by what was started."""
    view = view_of(norm_block(norm_bias), linears("up"), (NORM,), INGREDIENTS[learned])
    wanted = () if norm_bias or learned == "scales" else ("norm",)
    assert view.shifted_norms == wanted
    set_(view)
    assert view.shifted_norms == wanted
    extra = {name for name in view.tensors() if name.endswith(SHIFT_SUFFIX)}
    assert extra == {name + SHIFT_SUFFIX for name in wanted}


@pytest.mark.parametrize("scheme", [FLOATING_POINT, W4A16], ids=lambda scheme: scheme.name)
def test_a_bias_that_one_part_brings_is_one_of_the_whole(scheme):
    """Queries and keys get none: theirs is 0, in the view, frozen, and as one linear."""
    matrices = (*fused_linear("qkv", q=8, k=8, v=8), *linears("o"))
    stored = {"qkv.weight": random(24, HIDDEN), "o.weight": random(HIDDEN, 8, seed=1)}
    site = value_output_site("qkv.v", "o", heads=2, kv_heads=2, head_dim=4)
    view = view_of(stored, matrices, (site,), learned_by(**EVERYWHERE), scheme)
    set_(view)
    shift = view.parameters["let.o.shift"]
    tensors, frozen = view.tensors(), view.freeze()
    expected = torch.cat([torch.zeros(16), -shift / view.parameters["let.o.scale"]])
    torch.testing.assert_close(tensors["qkv.bias"], expected)
    assert torch.equal(frozen.tensors(torch.float32)["qkv.bias"], tensors["qkv.bias"])
    torch.testing.assert_close(tensors["o.bias"], stored["o.weight"] @ shift)
    whole = frozen.joined().tensors(torch.float32)
    assert torch.equal(whole["qkv.bias"], tensors["qkv.bias"])
    assert torch.equal(whole["qkv.weight"], tensors["qkv.weight"])


@pytest.mark.parametrize("rule", ["auto", "always"])
def test_no_shift_where_a_module_has_no_place_for_a_bias(rule):
    """A router that is kept, and experts: what leaves the norm would enter nowhere."""
    of_experts = experts("moe", "up", 2, reads_input=True, up=6)
    ingredients = learned_by(**{**EVERYWHERE, "let_shift": rule})
    for readers, matrices, extra in (
        (READERS, linears("up"), {"up.weight": (6, HIDDEN), "router.weight": (6, HIDDEN)}),
        (("moe.0.up", "moe.1.up"), of_experts, {"moe.up": (2, 6, HIDDEN)}),
    ):
        stored = {"norm.weight": random(HIDDEN), "norm.bias": random(HIDDEN, seed=1)}
        stored |= {name: random(*shape) for name, shape in extra.items()}
        site = norm_site("norm", readers, HIDDEN)
        view = view_of(stored, matrices, (site,), ingredients)
        assert view.parameter_shapes() == {"let.norm.scale": (HIDDEN,)}
        set_(view)
        assert view.tensors().keys() == stored.keys()


def test_a_shift_goes_into_a_bias_that_was_not_there():
    """Negative control of the place: a linear has one, whether or not it is used."""
    stored = {"norm.weight": random(HIDDEN), "up.weight": random(6, HIDDEN, seed=1)}
    view = view_of(
        stored, linears("up"), (norm_site("norm", ("up",), HIDDEN),), learned_by(**EVERYWHERE)
    )
    set_(view)
    assert view.tensors().keys() == {*stored, "up.bias", "norm" + SHIFT_SUFFIX}


def test_parts_of_one_scheme_are_quantised_as_the_whole():
    stored = {"qkv.weight": torch.cat([random(8, HIDDEN), 100 * random(8, HIDDEN, seed=1)])}
    parts, (whole,) = fused_linear("qkv", small=8, large=8), linears("qkv")
    frozen = view_of(stored, parts, (), (), W4A16).freeze()
    alone = view_of(stored, (whole,), (), (), W4A16).freeze()
    assert set(frozen.matrices) == {"qkv.small", "qkv.large"} and set(alone.matrices) == {"qkv"}
    for tensors in (frozen.tensors(torch.float32), frozen.joined().tensors(torch.float32)):
        assert torch.equal(tensors["qkv.weight"], alone.tensors(torch.float32)["qkv.weight"])


def test_a_look_at_the_start_does_not_fix_the_ranges():
    """Ranges that stay the same are kept: not those of weights into which scales are folded."""
    stored = norm_block(True)
    views = [view_of(stored, linears("up"), (NORM,), learned_by(**EVERYWHERE), W4A16) for _ in "ab"]
    views[0].tensors()
    for view in views:
        set_(view)
    weights = [view.tensors()["up.weight"] for view in views]
    assert torch.equal(*weights)
    assert torch.equal(views[0].freeze().tensors(torch.float32)["up.weight"], weights[0])
