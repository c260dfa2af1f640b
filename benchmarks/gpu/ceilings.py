"""What the machine is, and the most that it gives: copies, products, transfers."""

from __future__ import annotations

import importlib.util
import os
import platform

import torch
import transformers

from gpu.check import Check

NEEDED = ("compressed_tensors", "gguf", "loguru", "pydantic", "psutil", "rich", "jinja2")


def machine(check: Check) -> None:
    """The card, and versions."""
    name = torch.cuda.get_device_name(check.device) if check.on_cuda else "no GPU"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    check.say("card", f"{name}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads")
    check.say("versions", f"Python {platform.python_version()}, {versions}")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    check.say("packages", f"missing: {', '.join(missing)}" if missing else "all there")


def ceilings(check: Check) -> None:
    """Bytes and operations a second of torch's own kernels."""
    _copy(check)
    _products(check)
    _transfers(check)


def _copy(check: Check) -> None:
    size = 1 << (20 if check.small else 31)
    source = torch.empty(size, dtype=torch.uint8, device=check.device)
    target = torch.empty_like(source)
    seconds = check.timed(lambda: target.copy_(source))
    check.say("copy on the device", f"{2 * size / seconds / 1e12:.2f} TB/s, read and written")


def _products(check: Check) -> None:
    for tokens, columns, rows in ((8192, 8192, 8192), (2048, 4096, 11008)):
        if check.small:
            tokens, columns, rows = 64, 64, 64
        left, right = (
            torch.randn(sides, device=check.device, dtype=torch.bfloat16)
            for sides in ((tokens, columns), (columns, rows))
        )
        seconds = check.timed(lambda left=left, right=right: left @ right)
        rate = 2 * tokens * columns * rows / seconds / 1e12
        check.say(f"bfloat16 product {tokens} x {columns} x {rows}", f"{rate:.0f} TFLOP/s")


def _transfers(check: Check) -> None:
    size = 1 << (16 if check.small else 28)
    for pinned in (False, True):
        if pinned and not check.on_cuda:
            check.say("host to device, pinned", "no GPU")
            continue
        host = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        target = torch.empty(size, dtype=torch.uint8, device=check.device)
        seconds = check.timed(lambda host=host, target=target: target.copy_(host))
        kind = "pinned" if pinned else "pageable"
        check.say(f"host to device, {kind}", f"{size / seconds / 1e9:.1f} GB/s")
