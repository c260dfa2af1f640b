"""A whole transformers model in memory whose blocks compute as the learned ones do."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lrquant.architectures import architecture_of
from lrquant.blocks.experts import BlockTensors
from lrquant.blocks.head import cast_outer_linears
from lrquant.blocks.placement import Placement, Room, placement_of
from lrquant.blocks.runner import PreparedBlock, Variant
from lrquant.blocks.workbench import Workbench
from lrquant.model.skeleton import build_skeleton


@torch.no_grad()
def materialize(
    workbench: Workbench, variant: Variant, room: Room | None = None
) -> PreTrainedModel:
    """A model with a cache and `generate`: dense weights, activations quantised by hooks.

    `variant` gives each block as it is to compute; the result is on the workbench's device and
    independent of the workbench's own skeleton.  Where it is larger than what is free there, or
    than the first of `room`, its blocks lie on other devices too, on the host and on the disk.
    """
    model = workbench.model
    module = build_skeleton(
        copy.deepcopy(model.skeleton.config), architecture_of(model.skeleton.config)
    )
    placement = placement_of(workbench, room)
    if placement is not None:
        placement.end_with(module)
    state: dict[str, Tensor] = model.outer_tensors(workbench.device, workbench.dtype, head=True)
    outer = list(state)
    parts = [(model, variant.blocks)]
    if model.tower is not None and variant.tower is not None:
        parts.append((model.tower, variant.tower))
    for part, prepare in parts:
        for index in range(len(part.blocks)):
            name = part.block_name(index)
            state |= _entered(prepare(index), module.get_submodule(name), name, placement)
    for name, tensor in state.items():
        _register(module, name, tensor)
    for path, owner in module.named_modules():
        device = workbench.device if placement is None else placement.device(path)
        for leaf, buffer in owner._buffers.items():
            if buffer is not None and not buffer.is_meta:
                owner._buffers[leaf] = buffer.to(device)
    if model.generation is not None:
        module.generation_config = copy.deepcopy(model.generation)
    module.config.tie_word_embeddings = False  # two tensors here: the head is in another dtype
    cast_outer_linears(module, model.block_lists)
    if placement is not None:
        placement.dispatch(module, outer)
    return module


def _entered(
    prepared: PreparedBlock, block: nn.Module, name: str, placement: Placement | None
) -> dict[str, Tensor]:
    """The tensors of a block, whose hooks are set from now on, by their full names."""
    tensors = BlockTensors.whole(prepared.tensors)
    if placement is not None:
        device = placement.device(name)
        tensors = {leaf: tensor.to(device) for leaf, tensor in tensors.items()}
    runner = prepared.runner.on(block)
    own = {f"{name}.{leaf}": tensor for leaf, tensor in runner.bind(tensors).items()}
    runner.__enter__()
    if placement is None:
        return own
    buffers = {f"{name}.{leaf}" for leaf, _ in block.named_buffers()}
    return {
        leaf: tensor if leaf in buffers else placement.stored(leaf, tensor, name)
        for leaf, tensor in own.items()
    }


def _register(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Make a tensor the parameter, or buffer, of that name."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._buffers:
        owner.register_buffer(leaf, tensor)
    else:
        owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
