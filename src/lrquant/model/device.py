"""The device that a model computes on, the dtype of its matrix products, and dtypes' names."""

from __future__ import annotations

import psutil
import torch

from lrquant.errors import LRQuantError
from lrquant.team.launch import Launch


def dtype_name(dtype: torch.dtype) -> str:
    """bfloat16 rather than torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def choose_device(name: str) -> torch.device:
    """The device that "auto", "cpu", "cuda" or "cuda:N" means on this machine."""
    if name == "auto":
        return choose_device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise LRQuantError(f"device {name!r}: use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise LRQuantError(f"device {name!r}: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise LRQuantError(f"device {name!r}: torch sees {count} CUDA devices; use --device cpu")
    launch = Launch.of_environment()
    if device.type == "cuda" and launch.size > 1:
        _require_own_device(name, device, launch.local_rank)
    return device


def _require_own_device(name: str, device: torch.device, local_rank: int) -> None:
    """Refuse a CUDA device that several processes of this machine would share."""
    count = torch.cuda.device_count()
    if device.index is not None or local_rank >= count:
        raise LRQuantError(
            f"device {name!r}: each process takes a device of its own, of which torch sees {count} "
            "on this machine; start as many processes at most, with --device cuda"
        )


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products: bfloat16 where the hardware multiplies it fast."""
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32
