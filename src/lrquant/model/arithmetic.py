"""The arithmetic of CUDA here: sums in full precision, and the same bytes at every run.

torch decides both for a whole process; what it had been told before is told again afterwards.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lrquant.errors import LRQuantError

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_FIXED = ":4096:8"  # eight buffers of 4 MiB: cuBLAS then sums in one order


@contextmanager
def full_precision_sums() -> Iterator[None]:
    """Products of float32 without TF32, and those of bfloat16 summed in float32, on CUDA too."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    newer = products, convolutions.conv  # type: ignore[attr-defined]
    before = [each.fp32_precision for each in newer]
    reduced = products.allow_bf16_reduced_precision_reduction
    products.allow_tf32 = convolutions.allow_tf32 = False
    products.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = (each == "tf32" for each in before)
        for each, precision in zip(newer, before, strict=True):
            each.fp32_precision = precision
        products.allow_bf16_reduced_precision_reduction = reduced


def prepare_repeatable(device: torch.device) -> None:
    """Let cuBLAS sum in one order, unless the environment says how; before CUDA is first used."""
    if device.type == "cuda":
        os.environ.setdefault(_WORKSPACE, _FIXED)


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Kernels of CUDA alone that give the same bits each time; a CPU's do so anyway.

    LRQuantError where torch has none for what is computed.
    """
    if device.type != "cuda":
        yield
        return
    only_warn = torch.is_deterministic_algorithms_warn_only_enabled()
    before = torch.are_deterministic_algorithms_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)  # warnings alone leave attention's backward as it is
    memory.fill_uninitialized_memory = False
    try:
        yield
    except RuntimeError as error:
        refusal = _refusal(error)
        if refusal is None:
            raise
        raise refusal from error
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warn)
        memory.fill_uninitialized_memory = filled


def _refusal(error: RuntimeError) -> LRQuantError | None:
    """What torch refuses as not deterministic, in one line with its mend."""
    reason = str(error)
    if _WORKSPACE in reason:
        return LRQuantError(
            f"CUDA was in use before this run: set {_WORKSPACE}={_FIXED} in the environment, or "
            "use --no-deterministic"
        )
    if "deterministic" not in reason:
        return None
    return LRQuantError(
        f"{reason.split()[0]} gives other last digits each time on CUDA; use --no-deterministic, "
        "with which two runs differ in them"
    )
