"""Model families and vision towers: one file each, found by looking into this folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NoReturn

from transformers import AutoModelForCausalLM, PretrainedConfig

from lrquant.architectures.matrix import Matrix
from lrquant.architectures.sites import Site
from lrquant.config.declarations import declarations
from lrquant.errors import LRQuantError


@dataclass(frozen=True)
class Architecture:
    """A family: where its blocks are, their matrices and their sites.

    `blocks` is the path of the block list in the model that `auto_class` makes.  `matrices`,
    `sites` and `kept` name what is in one block, relative to it, by the block's index and `part` of
    the model's configuration, that of the blocks; every parameter of two or more axes is a matrix,
    or `kept` in floating point.  `refusal` returns why a configuration is not supported, or None.

    `language_types` are the model types of language parts of multimodal models that this family
    serves as well; `tower` is the path of the vision tower in a multimodal model; `reads_pixels`
    says that pictures enter the blocks, not tokens.  `windows_begin` says how windows of text
    begin: "stream", cut out of one stream as the family's published numbers are; "bos", each with
    BOS; or each as the family's "tokenizer" begins a text.
    """

    name: str
    model_types: tuple[str, ...]
    blocks: str
    matrices: Callable[[PretrainedConfig, int], tuple[Matrix, ...]]
    sites: Callable[[PretrainedConfig, int], tuple[Site, ...]]
    kept: Callable[[PretrainedConfig, int], tuple[str, ...]] = lambda config, block: ()
    refusal: Callable[[PretrainedConfig], str | None] = lambda config: None
    part: Callable[[PretrainedConfig], PretrainedConfig] = lambda config: config
    auto_class: Any = AutoModelForCausalLM
    language_types: tuple[str, ...] = ()
    tower: str | None = None
    reads_pixels: bool = False
    windows_begin: str = "tokenizer"


@cache
def architectures() -> dict[str, Architecture]:
    """Every family by the model types it serves: in this folder, and of other packages."""
    return {kind: each for each in _declared("ARCHITECTURE") for kind in each.model_types}


@cache
def language_parts() -> dict[str, Architecture]:
    """The family of each language part of a multimodal model, by the part's model type."""
    families = architectures()
    return families | {kind: f for f in families.values() for kind in f.language_types}


@cache
def towers() -> dict[str, Architecture]:
    """Every vision tower in this folder, by model type; `blocks` is relative to the tower."""
    return {kind: each for each in _declared("TOWER") for kind in each.model_types}


def _declared(attribute: str) -> list[Architecture]:
    group = "towers" if attribute == "TOWER" else "architectures"
    return declarations(group, __name__, attribute, Architecture)


def architecture_of(config: PretrainedConfig) -> Architecture:
    """The family that serves `config.model_type`; refuses what no family declares."""
    families = architectures()
    model_type = getattr(config, "model_type", None)
    if model_type not in families:
        raise LRQuantError(
            f"model family {model_type!r} is not declared; known: {', '.join(sorted(families))}; "
            "docs/add-an-architecture.md says how to add one"
        )
    architecture = families[model_type]
    reason = architecture.refusal(config)
    if reason is not None:
        raise LRQuantError(f"model family {model_type!r}: {reason}")
    return architecture


def find_tower(architecture: Architecture, config: PretrainedConfig) -> Architecture | None:
    """The vision tower of a multimodal model, its blocks named from the whole model's root.

    None where there is none, or none that is declared.
    """
    tower = None if architecture.tower is None else towers().get(config.vision_config.model_type)
    if tower is None:
        return None
    return dataclasses.replace(
        tower,
        blocks=f"{architecture.tower}.{tower.blocks}",
        part=lambda whole: whole.vision_config,
        auto_class=architecture.auto_class,
    )


def refuse_tower(architecture: Architecture, config: PretrainedConfig) -> NoReturn:
    """Say why a model has no vision tower that could be quantised."""
    if architecture.tower is None:
        raise LRQuantError(f"--vision-scheme: model family {config.model_type!r} has no tower")
    raise LRQuantError(
        f"--vision-scheme: the tower {config.vision_config.model_type!r} of this "
        f"{config.model_type!r} is not declared; known: {', '.join(sorted(towers()))}; leave "
        "the tower in floating point, or see docs/add-an-architecture.md"
    )
