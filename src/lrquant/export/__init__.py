"""Formats on disk: one file each, found by looking into this folder."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lrquant.config import Config
from lrquant.errors import LRQuantError
from lrquant.export.loading import Loading
from lrquant.export.parts import Part
from lrquant.export.targets import (
    chosen_for_target,
    loading_refusal,
    mended,
    tower_refusal,
)
from lrquant.learn.frozen import FrozenBlock
from lrquant.scheme import Scheme

DEFAULT = "compressed-tensors"
Decode = Callable[[dict[str, Tensor], str, dict[str, Any]], dict[str, Tensor]]
__all__ = ["DEFAULT", "Format", "Loading", "choose_format", "factor_refusal", "formats"]


@dataclass(frozen=True)
class Format:
    """What is special to a format: what it holds, and how a block's tensors are named and packed.

    `refusal` returns why a run cannot be written so and what would do, or None.  `tensors` gives a
    block's tensors, named relative to the block, floating-point ones in the checkpoint's dtype.
    `quantization_config` is what config.json says of it, or None for dense weights; it is given the
    quantised parts of the model, the language part first, and the names of the linears outside
    them, which stay as they are.
    `decode` undoes `tensors` by what config.json says alone: given a block's stored tensors, its
    full name and the quantization_config, it returns dense ones; shifts and input factors stay.
    `loading` says how a runtime (one of `TARGETS`) takes a scheme that the format holds, and what
    it then computes.
    `shape_refusal` returns why a weight (out, in) of that many rows and columns cannot be written,
    or None; `dtype` is the checkpoint's for a model's; `shifts` says whether modules may have
    biases and shifts that the architecture lacks.
    """

    name: str
    refusal: Callable[[Config], str | None]
    tensors: Callable[[FrozenBlock, Scheme, torch.dtype], dict[str, Tensor]]
    quantization_config: Callable[[Sequence[Part], list[str]], dict[str, Any] | None]
    loading: Callable[[Scheme, str], Loading] = lambda scheme, target: Loading(
        "this format does not say which runtimes load it"
    )
    decode: Decode = lambda tensors, block, quantization: dict(tensors)
    shape_refusal: Callable[[int, int], str | None] = lambda rows, columns: None
    dtype: Callable[[torch.dtype], torch.dtype] = lambda model: model
    shifts: bool = False


@cache
def formats() -> dict[str, Format]:
    """Every format in this folder, by name."""
    found: dict[str, Format] = {}
    for module_info in pkgutil.iter_modules(__path__):
        declared = getattr(
            importlib.import_module(f"{__name__}.{module_info.name}"), "FORMAT", None
        )
        if declared is not None:
            found[declared.name] = declared
    return found


def choose_format(config: Config) -> Format:
    """The format that the settings name, or the first that holds what they learn.

    With a `target` that is one which the target loads, `DEFAULT` before others; without, `DEFAULT`.
    """
    known = formats()
    if config.target is not None and config.format is None:
        return chosen_for_target(config, known, DEFAULT)
    name = config.format or DEFAULT
    if name not in known:
        raise LRQuantError(f"--format {name}: use one of {', '.join(sorted(known))}")
    reason = known[name].refusal(config) or tower_refusal(known[name], config)
    if reason is not None:
        other = "" if config.format else "; or --format dequantized"
        raise LRQuantError(f"--format {name}: {reason}{other}")
    if config.target is not None:
        reason = loading_refusal(known[name], config)
        if reason is not None:
            mend = mended(config, [known[name]]) or "leave --format or --target out"
            raise LRQuantError(f"--format {name} with --target {config.target}: {reason}; {mend}")
    return known[name]


def factor_refusal(config: Config) -> str | None:
    """Why a format whose linears are codes, scales and biases alone can't hold a run, or None."""
    if config.rotation and config.rotation_sharing in ("weight", "linear"):
        return (
            f"--rotation_sharing {config.rotation_sharing} leaves a factor to run time; learn with "
            "--rotation_sharing site"
        )
    return None
