"""gptqmodel's GPTQ in its own environment."""

from __future__ import annotations

import tempfile

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from in_toolkit import Stopwatch, Task
from torch import Tensor, nn


@torch.no_grad()
def dense_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model as the toolkit loads it, packed weights unpacked."""
    tensors = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, BaseQuantLinear):
            tensors[f"{name}.weight"] = module.dequantize_weight().T.contiguous()
    return tensors


def main() -> None:
    task = Task.of_arguments()
    config = QuantizeConfig(
        bits=task.bits.weights,
        group_size=task.bits.group_size or -1,
        sym=False,
        act_group_aware=task.bits.group_size is not None,  # its default, which asks for groups
        device="cpu",
    )
    model = GPTQModel.load(task.model, config)
    data = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in task.windows]
    with Stopwatch() as watch:
        model.quantize(data)
    with tempfile.TemporaryDirectory() as packed:
        model.save(packed)
        loaded = GPTQModel.load(packed, device="cpu", backend=BACKEND.TORCH)
        task.save(dense_tensors(loaded.model), watch, "gptqmodel")


if __name__ == "__main__":
    main()
