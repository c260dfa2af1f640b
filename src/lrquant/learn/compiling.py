"""Whether a run compiles its quantizers: what that takes against what it saves."""

from __future__ import annotations

import torch

from lrquant.blocks.plan import Plan, plan_block
from lrquant.config.groups import Learning
from lrquant.errors import LRQuantError
from lrquant.model.model import Model
from lrquant.numerics.compiled import why_not

# Of a weight in a pass, forward and backward, and of a shape of a matrix.  On a CPU as measured by
# benchmarks/step_cost.py; on CUDA as counted from the bytes that are moved, not measured.
SAVED_SECONDS = {"cpu": 2.5e-9, "cuda": 1e-10}
COMPILING_SECONDS = 10.0


def compiling(
    asked: str, device: torch.device, model: Model, plan: Plan, learning: Learning, samples: int
) -> tuple[bool, str]:
    """Whether quantizers are compiled, and why, in words.

    `asked` is "on", "off", or "auto": where it pays for a run of so many samples.  LRQuantError
    for "on" where nothing can be compiled.
    """
    if asked == "off":
        return False, "quantizers are not compiled"
    reason = why_not(device)
    if reason is not None:
        if asked == "on":
            raise LRQuantError(f"--compile on: {reason}; install it, or use --compile off")
        return False, f"quantizers are not compiled: {reason}"
    passes = learning.epochs * -(-samples // learning.micro_batch_size)
    saved, spent = _seconds(device, model, plan, passes)
    words = f"about {spent:.0f} s to compile, {saved:.0f} s saved"
    if asked == "on" or saved > spent:
        return True, f"quantizers are compiled ({words})"
    return False, f"quantizers are not compiled ({words})"


def _seconds(device: torch.device, model: Model, plan: Plan, passes: int) -> tuple[float, float]:
    """What compiling saves over all blocks, and what it takes once for each kind of matrix."""
    kinds: set[object] = set()
    weights = 0
    for index in range(len(model.blocks)):
        block, stored = plan_block(model, index, plan.schemes), model.blocks[index].state_dict()
        kinds |= {block.attention} - {None}
        for name, matrix in block.matrices.items():
            rows, columns = matrix.of(stored[matrix.parameter]).shape
            if block.schemes[name].quantizes_weights:
                kinds.add((rows, columns, block.schemes[name]))
                weights += rows * columns
    saved = SAVED_SECONDS.get(device.type, 0.0) * weights * passes
    return saved, COMPILING_SECONDS * len(kinds)
