"""A family's declaration, and all declarations that there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from transformers import AutoModelForCausalLM, PretrainedConfig

from lrquant.architectures.matrix import Matrix
from lrquant.architectures.sites import Site
from lrquant.config.declarations import declarations
from lrquant.config.settings import shown


@dataclass(frozen=True)
class Architecture:
    """A family: where its blocks are, their matrices and their sites.

    `blocks` is the path of the block list in the model that `auto_class` makes.  `matrices`,
    `sites` and `kept` name what is in one block, relative to it, by the block's index and `part` of
    the model's configuration, that of the blocks; every parameter of two or more axes is a matrix,
    or `kept` in floating point.  `assumes` are the values of settings for which all that is true;
    `refusal` returns why a configuration is not supported otherwise, or None.

    `language_types` are the model types of language parts of multimodal models that this family
    serves as well; `tower` is the path of the vision tower in a multimodal model; `reads_pixels`
    says that pictures enter the blocks, not tokens.  `own_attention` says that attention is
    computed in the blocks' own code, where Q, K and V can't be put on a grid; `in_tuples` that the
    model takes the first of what a block returns; `cumulative` that a block adds up along tokens
    (`cumsum`), for which CUDA has no repeatable kernel; `hands_on` is the argument, a mapping, in
    which blocks leave keys and values for later ones; `residuals` how many residual streams, along
    a first axis, a block takes and gives.  `windows_begin` says how windows of text
    begin: "stream", cut out of one stream as the family's published numbers are; "bos", each with
    BOS; or each as the family's "tokenizer" begins a text.
    """

    name: str
    model_types: tuple[str, ...]
    blocks: str
    matrices: Callable[[PretrainedConfig, int], tuple[Matrix, ...]]
    sites: Callable[[PretrainedConfig, int], tuple[Site, ...]]
    kept: Callable[[PretrainedConfig, int], tuple[str, ...]] = lambda config, block: ()
    assumes: Mapping[str, tuple[object, ...]] = field(default_factory=dict, hash=False)
    refusal: Callable[[PretrainedConfig], str | None] = lambda config: None
    part: Callable[[PretrainedConfig], PretrainedConfig] = lambda config: config
    auto_class: Any = AutoModelForCausalLM
    language_types: tuple[str, ...] = ()
    tower: str | None = None
    reads_pixels: bool = False
    own_attention: bool = False
    in_tuples: bool = False
    cumulative: bool = False
    hands_on: str | None = None
    residuals: Callable[[PretrainedConfig], int] = lambda config: 1
    windows_begin: str = "tokenizer"

    def objection(self, config: PretrainedConfig) -> str | None:
        """Why a configuration is not supported: a setting that is not as assumed, or `refusal`."""
        for name, values in self.assumes.items():
            for value in stated(config, name):
                if value not in values:
                    allowed = " or ".join(str(each) for each in values if each is not None)
                    return (
                        f"config.json says {name} {shown(value)}, and its declaration holds for "
                        f"{allowed or 'none'} alone; use a model of the usual form, or see "
                        "docs/add-an-architecture.md"
                    )
        return self.refusal(config)


def stated(config: PretrainedConfig, name: str) -> list[object]:
    """The values of a setting: of the configuration, and of the rotary embedding it describes.

    There may be one for each type of block.  A setting that is nowhere is None.
    """
    rotary = getattr(config, "rope_parameters", None) or {}
    by_type = [each for each in rotary.values() if isinstance(each, dict)] or [rotary]
    own = [getattr(config, name)] if hasattr(config, name) else []
    return [*own, *(each[name] for each in by_type if name in each)] or [None]


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
    return declarations(group, str(__package__), attribute, Architecture)
