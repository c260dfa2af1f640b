"""A whole transformers model in memory whose blocks compute as the learned ones do."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lrquant.blocks import cast_outer_linears
from lrquant.evaluation.perplexity import PreparedBlock
from lrquant.model import build_skeleton
from lrquant.workbench import Workbench


@torch.no_grad()
def materialize(workbench: Workbench, prepare: Callable[[int], PreparedBlock]) -> PreTrainedModel:
    """A model with a cache and `generate`: dense weights, activations quantised by hooks.

    `prepare` gives each block as it is to compute; the result is on the workbench's device and
    independent of the workbench's own skeleton.
    """
    model, architecture = workbench.model, workbench.model.architecture
    module = build_skeleton(copy.deepcopy(model.skeleton.config))
    state: dict[str, Tensor] = model.outer_tensors(workbench.device, workbench.dtype, head=True)
    for index in range(len(model.blocks)):
        prepared = prepare(index)
        runner = prepared.runner.on(module.get_submodule(model.block_name(index)), module.config)
        own = runner.bind(prepared.tensors)
        state.update({f"{model.block_name(index)}.{name}": t for name, t in own.items()})
        runner.__enter__()
    for name, tensor in state.items():
        owner = module.get_submodule(name.rpartition(".")[0])
        parameter = torch.nn.Parameter(tensor, requires_grad=False)
        owner.register_parameter(name.rpartition(".")[2], parameter)
    module.config.tie_word_embeddings = False  # two tensors here: the head is in another dtype
    cast_outer_linears(module, architecture.blocks)
    return module
