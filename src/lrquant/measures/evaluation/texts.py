"""The texts that measures ask for, read before any hour is spent."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lrquant.config.groups import MeasureSettings, Sources
from lrquant.data.beginnings import beginning_of
from lrquant.data.conversations import is_conversations
from lrquant.data.prompts import Reader, picture_samples, takes_pictures
from lrquant.data.samples import Samples, perplexity_windows
from lrquant.data.texts import require_known
from lrquant.data.vocabulary import require_known_tokens
from lrquant.errors import LRQuantError
from lrquant.measures.choice import text_measures

logger = logging.getLogger("lrquant")


@dataclass(frozen=True)
class AskedText:
    """A text by name; `needed` says whether it must be there, or is left out where it is not."""

    name: str
    needed: bool


def texts_of(measuring: MeasureSettings) -> list[AskedText]:
    """Every text that a measure asks for, once, in the order of the measures."""
    needed: dict[str, bool] = {}
    for measure in text_measures():
        settings = measuring[measure.settings]
        for name in measure.texts(settings):
            needed[name] = needed.get(name, False) or measure.needs(settings)
    return [AskedText(name, must) for name, must in needed.items()]


def require_known_texts(measuring: MeasureSettings, sources: Sources) -> None:
    """Refuse a name that must be there and is not known, before a model is opened."""
    for text in texts_of(measuring):
        if text.needed:
            require_known(text.name, sources.data_folder)


def read_texts(asked: Iterable[AskedText], sources: Sources, reader: Reader) -> dict[str, Samples]:
    """Texts by name: windows of one model's tokens, or conversations (.jsonl).

    Those that are not needed and can't be had are named in the log and left out, as long as one is
    left.
    """
    texts: dict[str, Samples] = {}
    missing: list[LRQuantError] = []
    for text in asked:
        try:
            texts[text.name] = _read(text.name, sources, reader)
        except LRQuantError as error:
            if text.needed:
                raise
            missing.append(error)
            logger.warning("text %s is left out: %s", text.name, error)
    if missing and not texts:
        raise missing[0]
    for name, samples in texts.items():
        require_known_tokens(samples.feed, name, reader)
    return texts


def _read(name: str, sources: Sources, reader: Reader) -> Samples:
    if reader.tokenizer is None:
        raise LRQuantError("no tokenizer: perplexity needs one")
    if is_conversations(Path(name)) and takes_pictures(reader):
        return picture_samples(Path(name), reader, sources.limit)
    model_type = reader.architecture.part(reader.skeleton.config).model_type
    return perplexity_windows(
        name,
        reader.tokenizer,
        sources.seqlen,
        sources.limit,
        sources.data_folder,
        sources.cache_folder,
        beginning_of(reader.tokenizer, model_type, sources.bos),
        sources.text_column,
    )
