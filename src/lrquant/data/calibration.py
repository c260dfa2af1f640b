"""Calibration: what a run learns on, text, conversations with pictures, or samples of one's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lrquant.config.groups import Calibrating, Sources
from lrquant.data.beginnings import beginning_of
from lrquant.data.own import OwnData, own_samples
from lrquant.data.prompts import mixed, picture_samples
from lrquant.data.samples import Samples, Writer, calibration_samples
from lrquant.data.vocabulary import require_known_tokens
from lrquant.errors import LRQuantError
from lrquant.model.model import Model


def calibration_of(
    asked: Calibrating,
    sources: Sources,
    model: Model,
    own: OwnData | None,
    writer: Writer | None = None,
) -> Samples:
    """The samples to learn on: one's own, or those that the settings name.

    `writer` has those that the model writes itself.  Raises LRQuantError for token ids that the
    model does not have.
    """
    if own is None:
        chosen = _named_samples(asked, sources, model, writer)
    else:
        chosen = own_samples(own, asked, sources, model)
    require_known_tokens(chosen.feed, chosen.name, model)
    return chosen


def tuning_samples_of(
    asked: Calibrating,
    sources: Sources,
    model: Model,
    own: OwnData | None,
    count: int | None,
    writer: Writer | None = None,
) -> Samples:
    """The samples of the end-to-end stage: drawn apart, `count` of them, by default as many.

    Samples that were given as they are serve both: there is nothing to draw from.
    """
    apart = replace(asked, count=asked.count if count is None else count, seed=asked.seed + 1)
    return calibration_of(apart, sources, model, own, writer)


def _named_samples(
    asked: Calibrating, sources: Sources, model: Model, writer: Writer | None
) -> Samples:
    if asked.images is None:
        if model.architecture.reads_pixels:
            raise LRQuantError(
                f"model {model.name}: a classifier of pictures; give some to calibrate on with "
                "--calib-images FOLDER"
            )
        return _text_samples(asked, sources, model, asked.count, writer)
    count = asked.count
    if not model.architecture.reads_pixels:
        count = max(1, round(count * asked.image_share))
    weight = asked.image_token_weight
    pictures = picture_samples(Path(asked.images), model, count, asked.seed, weight)
    if count == asked.count:
        return pictures
    text = _text_samples(asked, sources, model, asked.count - len(pictures.feed), writer)
    return mixed(pictures, text, asked.seed)


def _text_samples(
    asked: Calibrating, sources: Sources, model: Model, count: int, writer: Writer | None
) -> Samples:
    if model.tokenizer is None:
        raise LRQuantError("no tokenizer: give one, or token ids as `calibration`")
    return calibration_samples(
        asked.dataset,
        model.tokenizer,
        count,
        sources.seqlen,
        asked.seed,
        sources.data_folder,
        sources.cache_folder,
        beginning_of(model.tokenizer, model.config.model_type, sources.bos),
        sources.text_column,
        writer,
    )
