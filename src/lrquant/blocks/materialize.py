"""A whole transformers model in memory whose blocks compute as the learned ones do."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lrquant.architectures import architecture_of
from lrquant.blocks.experts import BlockTensors
from lrquant.blocks.head import cast_outer_linears
from lrquant.blocks.runner import Variant
from lrquant.blocks.workbench import Workbench
from lrquant.model.skeleton import build_skeleton


@torch.no_grad()
def materialize(workbench: Workbench, variant: Variant) -> PreTrainedModel:
    """A model with a cache and `generate`: dense weights, activations quantised by hooks.

    `variant` gives each block as it is to compute; the result is on the workbench's device and
    independent of the workbench's own skeleton.
    """
    model = workbench.model
    module = build_skeleton(
        copy.deepcopy(model.skeleton.config), architecture_of(model.skeleton.config)
    )
    state: dict[str, Tensor] = model.outer_tensors(workbench.device, workbench.dtype, head=True)
    parts = [(model, variant.blocks)]
    if model.tower is not None and variant.tower is not None:
        parts.append((model.tower, variant.tower))
    for part, prepare in parts:
        for index in range(len(part.blocks)):
            prepared = prepare(index)
            runner = prepared.runner.on(module.get_submodule(part.block_name(index)))
            own = runner.bind(BlockTensors.whole(prepared.tensors))
            state.update({f"{part.block_name(index)}.{name}": t for name, t in own.items()})
            runner.__enter__()
    for name, tensor in state.items():
        owner = module.get_submodule(name.rpartition(".")[0])
        leaf = name.rpartition(".")[2]
        if leaf in owner._buffers:
            owner.register_buffer(leaf, tensor)
        else:
            owner.register_parameter(leaf, torch.nn.Parameter(tensor, requires_grad=False))
    for owner in module.modules():
        for leaf, buffer in owner._buffers.items():
            if buffer is not None and not buffer.is_meta:
                owner._buffers[leaf] = buffer.to(workbench.device)
    if model.generation is not None:
        module.generation_config = copy.deepcopy(model.generation)
    module.config.tie_word_embeddings = False  # two tensors here: the head is in another dtype
    cast_outer_linears(module, model.block_lists)
    return module
