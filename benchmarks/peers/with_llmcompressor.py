"""llmcompressor's round-to-nearest, GPTQ, AWQ and SpinQuant, in its own environment."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from datasets import Dataset
from in_toolkit import Bits, Stopwatch, Task
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform import AWQModifier, SpinQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from torch import nn
from transformers import AutoModelForCausalLM


def recipe(setting: str, bits: Bits) -> list[Any]:
    """The modifiers of a setting; the scheme apart they have the toolkit's defaults."""
    weights = QuantizationArgs(
        num_bits=bits.weights,
        symmetric=False,
        strategy="channel" if bits.group_size is None else "group",
        group_size=bits.group_size,
    )
    activations = None
    if bits.activations is not None:
        activations = QuantizationArgs(
            num_bits=bits.activations, symmetric=False, strategy="token", dynamic=True
        )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=activations)
    groups: dict[str, Any] = {"config_groups": {"group_0": scheme}, "ignore": ["lm_head"]}
    if setting.startswith("SpinQuant"):
        # The default, "hadamard", has matrices of powers of two alone; 576, the width, is none.
        rotation = SpinQuantModifier(transform_type="random-hadamard")
        rounding = GPTQModifier if setting == "SpinQuant and GPTQ" else QuantizationModifier
        return [rotation, rounding(**groups)]
    return {
        "round-to-nearest": [QuantizationModifier(**groups)],
        "GPTQ": [GPTQModifier(**groups)],
        "AWQ": [AWQModifier(), QuantizationModifier(**groups)],
    }[setting]


@torch.no_grad()
def round_weights_(model: nn.Module) -> None:
    """Round weights for good that the toolkit rounds at each forward; GPTQ's are on their grid."""
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if isinstance(module, nn.Linear) and scheme is not None:
            grid = module.weight_scale, module.weight_zero_point, scheme.weights
            module.weight.copy_(fake_quantize(module.weight, *grid))


def main() -> None:
    task = Task.of_arguments()
    model = AutoModelForCausalLM.from_pretrained(task.model)
    masks = [[1] * len(window) for window in task.windows]
    torch.manual_seed(0)
    # AWQ page-locks memory for a GPU, which torch refuses where there is none; nothing else is
    # changed by leaving it out.
    with patch.object(IntermediatesCache, "pin_memory"), Stopwatch() as watch:
        oneshot(
            model=model,
            dataset=Dataset.from_dict({"input_ids": task.windows, "attention_mask": masks}),
            recipe=recipe(task.setting, task.bits),
            num_calibration_samples=len(task.windows),
            max_seq_length=len(task.windows[0]),
        )
    round_weights_(model)
    task.save(model.state_dict(), watch, "llmcompressor", "compressed-tensors")


if __name__ == "__main__":
    main()
