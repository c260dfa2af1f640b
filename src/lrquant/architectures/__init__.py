"""Model families: one file each, found by looking into this folder."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from transformers import PretrainedConfig

from lrquant.errors import LRQuantError
from lrquant.sites import Site


@dataclass(frozen=True)
class Architecture:
    """What is special to a family: where its blocks are, their linears and their sites.

    `blocks` is the path of the block list in the causal language model; `linears` and `sites` name
    modules relative to one block.  `refusal` returns why a configuration is not supported, or None.
    """

    name: str
    model_types: tuple[str, ...]
    blocks: str
    linears: Callable[[PretrainedConfig], tuple[str, ...]]
    sites: Callable[[PretrainedConfig], tuple[Site, ...]]
    refusal: Callable[[PretrainedConfig], str | None] = lambda config: None


@cache
def architectures() -> dict[str, Architecture]:
    """Every family in this folder, by the model types it serves."""
    found: dict[str, Architecture] = {}
    for module_info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{module_info.name}")
        declared = getattr(module, "ARCHITECTURE", None)
        if declared is not None:
            found.update(dict.fromkeys(declared.model_types, declared))
    return found


def architecture_of(config: PretrainedConfig) -> Architecture:
    """The family that serves `config.model_type`; refuses what no family declares."""
    known = architectures()
    model_type = getattr(config, "model_type", None)
    if model_type not in known:
        raise LRQuantError(
            f"model family {model_type!r} is not declared; known: {', '.join(sorted(known))}; "
            "docs/add-an-architecture.md says how to add one"
        )
    architecture = known[model_type]
    reason = architecture.refusal(config)
    if reason is not None:
        raise LRQuantError(f"model family {model_type!r}: {reason}")
    return architecture
