"""Quantizers compiled by torch: the same functions, their passes over memory fused.

What they give is the same bit for bit; sums of gradients differ in their last bits.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, TypeVar

import torch

R = TypeVar("R")
# The names under which torch's versions take the rounding of divisions.
_DIVISIONS = ("eager_numerics.division_rounding", "emulate_divison_rounding")
_REPEATABLE = "deterministic"
_VARIANTS = 256  # of a function, by shapes, grids and what is learned; torch's own limit is 8
_COMPILERS = ("g++", "clang++", "c++")


def why_not(device: torch.device) -> str | None:
    """Why nothing can be compiled for a device here, or None."""
    if device.type == "cuda":
        if find_spec("triton") is None:
            return "the package triton is not installed"
        return None if _division() else f"torch {torch.__version__} compiles divisions inexactly"
    if any(shutil.which(name) for name in _COMPILERS):
        return None
    return f"no C++ compiler ({', '.join(_COMPILERS)}) is on the PATH"


def call_compiled(function: Callable[..., R], *arguments: Any, by_size: bool = True) -> R:
    """What a function of tensors gives, by its compiled form.

    It is compiled anew for other kinds of arguments; for other sizes too if `by_size`, else once
    more for all of them.
    """
    repeatable = torch.are_deterministic_algorithms_enabled()
    return _compiled(function, by_size, repeatable)(*arguments)


@cache
def _compiled(function: Callable[..., R], by_size: bool, repeatable: bool) -> Callable[..., R]:
    """Without these options a scale would not be rounded to the dtype that it is stored in, and on
    CUDA a division not as IEEE has it: weights near a border would take another code.  Where sums
    are to be `repeatable`, no clock decides how they are split.  Torch's limit of variants is
    raised for the process: to set it around each call costs more than the call beside its kernels.
    """
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, _VARIANTS)
    options: dict[str, Any] = {"emulate_precision_casts": True}
    if torch.cuda.is_available():
        named = {str(_division()): True, _REPEATABLE: repeatable}
        options |= {
            name: on for name, on in named.items() if name in torch._inductor.list_options()
        }
    return torch.compile(function, dynamic=False if by_size else None, options=options)


def _division() -> str | None:
    """What this version of torch calls the option by which divisions are rounded as IEEE has it."""
    return next((name for name in _DIVISIONS if name in torch._inductor.list_options()), None)
