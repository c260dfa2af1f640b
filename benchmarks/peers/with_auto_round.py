"""AutoRound in its own environment; the setting is its number of iterations."""

from __future__ import annotations

from typing import Any

import torch
from auto_round import AutoRound
from in_toolkit import Bits, Stopwatch, Task
from torch import Tensor, nn


def words(bits: Bits) -> dict[str, Any]:
    """A scheme in the toolkit's words."""
    scheme: dict[str, Any] = {"bits": bits.weights, "group_size": bits.group_size or -1}
    scheme["sym"] = False
    if bits.activations is not None:
        scheme |= {"act_bits": bits.activations, "act_group_size": -1}
        scheme |= {"act_sym": False, "act_dynamic": True}
    return scheme


def dense_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model that the toolkit quantised in memory, by the original names.

    It keeps rounded weights in bfloat16; packed, they are whole multiples of their scales, and so
    they are here.
    """
    # Where activations are quantised too each linear is wrapped.
    tensors = {name.replace(".orig_layer.", "."): t for name, t in model.state_dict().items()}
    for name, module in model.named_modules():
        scale = getattr(module, "scale", None)
        if isinstance(module, nn.Linear) and isinstance(scale, Tensor):
            scale = scale.float().view(len(module.weight), -1, 1)
            groups = module.weight.float().view(*scale.shape[:2], -1)
            weight = (groups / scale).round() * scale
            tensors[f"{name.removesuffix('.orig_layer')}.weight"] = weight.flatten(1)
    return tensors


def main() -> None:
    task = Task.of_arguments()
    windows = [torch.tensor([window]) for window in task.windows]
    rounding = AutoRound(
        task.model,
        iters=int(task.setting),
        nsamples=len(windows),
        seqlen=windows[0].shape[1],
        dataset=[{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in windows],
        device_map="cpu",
        **words(task.bits),
    )
    with Stopwatch() as watch:
        model, _ = rounding.quantize()
    with torch.no_grad():
        task.save(dense_tensors(model), watch, "auto-round")


if __name__ == "__main__":
    main()
