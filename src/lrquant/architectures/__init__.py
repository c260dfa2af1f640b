"""Model families and vision towers: one file each, found by looking into this folder."""

from __future__ import annotations

import dataclasses
from typing import NoReturn

from transformers import PretrainedConfig

from lrquant.architectures.architecture import (
    Architecture,
    architectures,
    language_parts,
    towers,
)
from lrquant.architectures.nearest import nearest
from lrquant.errors import LRQuantError

__all__ = [
    "Architecture",
    "architecture_of",
    "architectures",
    "find_tower",
    "language_parts",
    "refuse_tower",
    "towers",
]


def architecture_of(config: PretrainedConfig) -> Architecture:
    """The family that serves `config.model_type`; refuses what no family declares."""
    families = architectures()
    model_type = getattr(config, "model_type", None)
    if model_type not in families:
        raise LRQuantError(
            f"model family {model_type!r} is not declared; {nearest(config)}; docs/families.md "
            "lists those that are, docs/add-an-architecture.md says how to add one"
        )
    architecture = families[model_type]
    reason = architecture.objection(config)
    if reason is not None:
        raise LRQuantError(f"model family {model_type!r}: {reason}")
    return architecture


def find_tower(architecture: Architecture, config: PretrainedConfig) -> Architecture | None:
    """The vision tower of a multimodal model, its blocks named from the whole model's root.

    None where there is none, or none that is declared.
    """
    vision = getattr(config, "vision_config", None) if architecture.tower is not None else None
    tower = None if vision is None else towers().get(vision.model_type)
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
    if architecture.tower is None or config.vision_config is None:
        raise LRQuantError(f"--vision-scheme: model family {config.model_type!r} has no tower")
    raise LRQuantError(
        f"--vision-scheme: the tower {config.vision_config.model_type!r} of this "
        f"{config.model_type!r} is not declared; known: {', '.join(sorted(towers()))}; leave "
        "the tower in floating point, or see docs/add-an-architecture.md"
    )
