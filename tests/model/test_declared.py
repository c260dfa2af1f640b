"""A model against its declaration: every matrix of every block, or a refusal that names it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from lrquant.architectures import Architecture, architectures, decoder
from lrquant.architectures.matrix import Matrix, experts, fused_linear, linears
from lrquant.errors import LRQuantError
from lrquant.model.declared import require_declared
from lrquant.model.loading import from_module, load_model

EXPERTS, WIDTH, HIDDEN = 4, 16, 32
ATTENTION = linears(*(f"self_attn.{name}_proj" for name in "qkvo"))
OF_EXPERTS = (
    *experts("mlp.experts", "gate_up_proj", EXPERTS, reads_input=True, gate=WIDTH, up=WIDTH),
    *experts("mlp.experts", "down_proj", EXPERTS, reads_input=False, down=HIDDEN),
)
ROUTER = "mlp.gate.weight"


def declared(matrices, kept=()) -> Architecture:
    """A family whose blocks are so; each is a tuple, or a function of the block's index."""

    def by_block(value):
        return value if callable(value) else lambda block: value

    return Architecture(
        name="odd",
        model_types=("odd",),
        blocks="model.layers",
        matrices=lambda config, block: by_block(matrices)(block),
        sites=lambda config, block: (),
        kept=lambda config, block: by_block(kept)(block),
    )


@pytest.fixture
def of_experts():
    """of_experts(dense blocks) -> a model on the meta device whose other blocks have experts."""

    def make(*dense: int):
        config = Qwen3MoeConfig(
            vocab_size=264,
            hidden_size=HIDDEN,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_experts=EXPERTS,
            num_experts_per_tok=2,
            moe_intermediate_size=WIDTH,
            mlp_only_layers=list(dense),
        )
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")

    return make


def refusal(model, architecture: Architecture) -> str:
    with pytest.raises(LRQuantError) as caught:
        require_declared(model, architecture)
    message = str(caught.value)
    assert message.startswith("model family 'odd': ") and "\n" not in message
    return message


def test_every_family_here_is_declared_whole(variant, make_model):
    model = make_model(variant)
    require_declared(model, architectures()[model.config.model_type])


def test_a_linear_left_out_is_named(make_model):
    names = [name for name in decoder.LINEARS if name != "mlp.up_proj"]
    message = refusal(make_model("llama"), declared(linears(*names)))
    assert "the linears of block 0 and the declared ones differ (mlp.up_proj)" in message


def test_a_linear_that_is_not_there_is_named(make_model):
    message = refusal(make_model("llama"), declared(linears(*decoder.LINEARS, "mlp.extra")))
    assert "the linears of block 0 and the declared ones differ (mlp.extra)" in message


def test_a_linear_may_be_kept(make_model):
    names = [name for name in decoder.LINEARS if name != "mlp.up_proj"]
    require_declared(make_model("llama"), declared(linears(*names), ("mlp.up_proj.weight",)))


def test_a_parameter_that_is_not_there_is_named(of_experts):
    odd = (*ATTENTION, *OF_EXPERTS, Matrix("mlp.shared", "mlp.shared_up", expert=0))
    message = refusal(of_experts(), declared(odd, (ROUTER,)))
    assert "block 0 has no mlp.shared_up" in message


def test_experts_that_are_declared_and_a_router_that_is_kept(of_experts):
    require_declared(of_experts(), declared((*ATTENTION, *OF_EXPERTS), (ROUTER,)))


def test_experts_may_be_kept(of_experts):
    kept = (ROUTER, "mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    require_declared(of_experts(), declared(ATTENTION, kept))


@pytest.mark.parametrize(
    ("matrices", "kept", "name", "shape"),
    [
        (ATTENTION, (ROUTER,), "mlp.experts.gate_up_proj", (EXPERTS, 2 * WIDTH, HIDDEN)),
        (
            (*ATTENTION, *OF_EXPERTS[: 2 * EXPERTS]),
            (ROUTER,),
            "mlp.experts.down_proj",
            (EXPERTS, HIDDEN, WIDTH),
        ),
        ((*ATTENTION, *OF_EXPERTS), (), ROUTER, (EXPERTS, HIDDEN)),
    ],
    ids=["all experts", "their second matrix", "the router"],
)
def test_what_is_neither_declared_nor_kept_is_named(of_experts, matrices, kept, name, shape):
    message = refusal(of_experts(), declared(matrices, kept))
    assert f"{name} of block 0, {shape}, is declared neither as a matrix nor as kept" in message
    assert message.endswith("see docs/add-an-architecture.md")


FUSED = "self_attn.q_proj"


@pytest.mark.parametrize(
    "parts",
    [
        fused_linear(FUSED, a=16),
        fused_linear(FUSED, a=16, b=32),
        (Matrix(f"{FUSED}.b", f"{FUSED}.weight", rows=(16, 32)),),
        (
            Matrix(f"{FUSED}.a", f"{FUSED}.weight", rows=(0, 16)),
            Matrix(f"{FUSED}.b", f"{FUSED}.weight", rows=(0, 16)),
        ),
        (*linears(FUSED), *fused_linear(FUSED, a=16)),
        (Matrix(f"{FUSED}.a", f"{FUSED}.weight", expert=0),),
    ],
    ids=["the first rows", "too many", "the last rows", "twice", "whole and part", "an expert"],
)
def test_parts_that_do_not_make_the_whole_are_refused(make_model, parts):
    others = linears(*(name for name in decoder.LINEARS if name != FUSED))
    whole = fused_linear(FUSED, a=16, b=16)
    require_declared(make_model("llama"), declared((*others, *whole)))
    message = refusal(make_model("llama"), declared((*others, *parts)))
    assert f"{FUSED}.weight of block 0, (32, 32), is declared only in part, or twice" in message


def test_two_matrices_of_one_name_are_refused(make_model):
    others = linears(*(name for name in decoder.LINEARS if name != FUSED))
    halves = [Matrix(FUSED, f"{FUSED}.weight", rows=rows) for rows in ((0, 16), (16, 32))]
    message = refusal(make_model("llama"), declared((*others, *halves)))
    assert f"{FUSED} of block 0 is the name of several matrices" in message


def test_one_expert_left_out_or_too_many_is_refused(of_experts):
    for count in (EXPERTS - 1, EXPERTS + 1):
        gates = experts("mlp.experts", "gate_up_proj", count, reads_input=True, both=2 * WIDTH)
        matrices = (*ATTENTION, *gates, *OF_EXPERTS[2 * EXPERTS :])
        message = refusal(of_experts(), declared(matrices, (ROUTER,)))
        assert "mlp.experts.gate_up_proj of block 0" in message and "in part" in message


def test_block_0_does_not_stand_for_all(of_experts):
    """The first dense, the second of experts: what is right for one is wrong for the other."""
    model = of_experts(0)
    dense = linears(*decoder.LINEARS)
    of_both = ((dense, ()), ((*ATTENTION, *OF_EXPERTS), (ROUTER,)))
    require_declared(
        model, declared(lambda block: of_both[block][0], lambda block: of_both[block][1])
    )
    message = refusal(model, declared(dense))
    assert "block 1" in message and "block 0" not in message
    turned = declared(lambda block: of_both[1 - block][0], lambda block: of_both[1 - block][1])
    assert "block 0" in refusal(model, turned)
    assert "block 1" in refusal(of_experts(1), declared((*ATTENTION, *OF_EXPERTS), (ROUTER,)))


def test_a_model_in_memory_and_one_in_a_folder_are_held_against_it(
    make_model, model_folder, monkeypatch
):
    odd = dataclasses.replace(
        architectures()["llama"], matrices=lambda config, block: linears(*decoder.LINEARS[1:])
    )
    folder = str(model_folder("llama"))
    from_module(make_model("llama")), load_model(folder)
    monkeypatch.setattr("lrquant.model.loading.architecture_of", lambda config: odd)
    for load in (lambda: from_module(make_model("llama")), lambda: load_model(folder)):
        with pytest.raises(LRQuantError, match=r"declared ones differ \(self_attn\.q_proj\)"):
            load()


def test_the_blocks_of_a_tower_are_held_against_theirs(monkeypatch):
    """A tower whose MLP is left out of its declaration."""
    from transformers import AutoModelForImageTextToText, LlavaConfig

    from lrquant.architectures import towers

    shape = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2}
    config = LlavaConfig(
        text_config={"model_type": "llama", "vocab_size": 264, **shape, **heads},
        vision_config={
            "model_type": "clip_vision_model",
            "image_size": 16,
            "patch_size": 4,
            **shape,
            **heads,
        },
        image_token_id=260,
    )
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
    family = architectures()["llava"]
    require_declared(model, family)
    tower = towers()["clip_vision_model"]
    cut = dataclasses.replace(tower, matrices=lambda c, block: tower.matrices(c, block)[:4])
    monkeypatch.setattr("lrquant.architectures.towers", lambda: {"clip_vision_model": cut})
    with pytest.raises(LRQuantError, match=r"linears of block 0 .*mlp\.fc1, mlp\.fc2"):
        require_declared(model, family)


def test_a_module_that_has_more_or_less_than_its_config_says_is_refused(make_model):
    """Nothing is lost without a word."""
    module = make_model("llama")
    output = module.model.layers[1].self_attn.o_proj
    output.bias = torch.nn.Parameter(torch.ones(len(output.weight)), requires_grad=False)
    with pytest.raises(LRQuantError, match=r"o_proj\.bias: a model of its config has no"):
        from_module(module)
    output.bias = None
    assert from_module(module)
    module.model.layers[1].self_attn.o_proj = torch.nn.Sequential(output)
    with pytest.raises(LRQuantError, match=r"lacks model\.layers\.1\.self_attn\.o_proj\.weight"):
        from_module(module)
