"""Whole models over two devices that compute nothing: an operation on both at once is an error."""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

import pretended
from lrquant.blocks import placement
from lrquant.blocks.materialize import materialize
from lrquant.blocks.plan import Plan
from lrquant.blocks.runner import INPUT_FACTOR_SUFFIX, PreparedBlock, Variant
from lrquant.blocks.variants import unlearned
from lrquant.blocks.workbench import Workbench
from lrquant.config.scheme import Scheme
from lrquant.config.schemes import Schemes
from lrquant.model.loading import from_module

FIRST, SECOND = "pretended:0", "pretended:1"


def with_factors(variant: Variant) -> Variant:
    """Every block with a factor of what its linears read, where blocks are made."""

    def prepare(index: int) -> PreparedBlock:
        block = variant(index)
        factors = {
            name + INPUT_FACTOR_SUFFIX: torch.ones_like(block.tensors[f"{name}.weight"][0])
            for name in block.runner.inputs
        }
        return replace(block, tensors={**block.tensors, **factors})

    return Variant(prepare)


def devices_of(folder: str) -> tuple[list[str], str]:
    """Of the blocks' parameters, and of the logits."""
    config = AutoConfig.from_pretrained(folder, attn_implementation="eager")
    model = from_module(AutoModelForCausalLM.from_pretrained(folder, config=config))
    plan = Plan(Schemes(Scheme(4, 4)))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        bench = Workbench(model, torch.device(FIRST), torch.float32, "host", plan=plan)
        outer, blocks = placement.whole_bytes(model, torch.float32)
        room = {FIRST: outer + next(iter(blocks.values())), SECOND: 2**40}
        module = materialize(bench, with_factors(unlearned(bench)), room)
        ids = torch.ones((2, 12), dtype=torch.long, device=FIRST)
        logits = module(ids, use_cache=False).logits
    parameters = [next(module.get_submodule(name).parameters()) for name in blocks]
    return [str(parameter.device) for parameter in parameters], str(logits.device)


if __name__ == "__main__":
    pretended.begin()
    placement._MAKING = 0
    for folder in sys.argv[1:]:
        (first, *others), logits = devices_of(folder)
        assert (first, set(others), logits) == (FIRST, {SECOND}, FIRST), folder
