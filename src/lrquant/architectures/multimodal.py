"""Shared shape of models of a language part, a vision tower and a projector between them."""

from __future__ import annotations

from transformers import AutoModelForImageTextToText, PretrainedConfig

from lrquant.architectures import Architecture, language_parts
from lrquant.architectures.matrix import Matrix
from lrquant.architectures.nearest import nearest
from lrquant.architectures.sites import Site


def multimodal(
    name: str,
    model_types: tuple[str, ...],
    blocks: str,
    tower: str,
    hands_on: str | None = None,
) -> Architecture:
    """A family whose language blocks are those of the family that serves the language part.

    `blocks` and `tower` are the paths of the language blocks and of the vision tower; `hands_on` is
    the language blocks' own.
    """
    return Architecture(
        name=name,
        model_types=model_types,
        blocks=blocks,
        matrices=_matrices,
        sites=_sites,
        kept=_kept,
        refusal=_refusal,
        part=lambda config: config.get_text_config(),
        auto_class=AutoModelForImageTextToText,
        tower=tower,
        hands_on=hands_on,
        residuals=_residuals,
    )


def _matrices(text: PretrainedConfig, block: int) -> tuple[Matrix, ...]:
    return language_parts()[text.model_type].matrices(text, block)


def _sites(text: PretrainedConfig, block: int) -> tuple[Site, ...]:
    return language_parts()[text.model_type].sites(text, block)


def _kept(text: PretrainedConfig, block: int) -> tuple[str, ...]:
    return language_parts()[text.model_type].kept(text, block)


def _residuals(text: PretrainedConfig) -> int:
    return language_parts()[text.model_type].residuals(text)


def _refusal(config: PretrainedConfig) -> str | None:
    text = config.get_text_config()
    families = language_parts()
    if text.model_type not in families:
        return f"its language part {text.model_type!r} is not declared; {nearest(config)}"
    return families[text.model_type].objection(text)
