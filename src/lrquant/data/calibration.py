"""Calibration: what a run learns on, text, conversations with pictures, or samples of one's own."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lrquant.config.groups import Calibrating, Sources
from lrquant.data.beginnings import beginning_of
from lrquant.data.feeds import Feed
from lrquant.data.prompts import mixed, picture_samples
from lrquant.data.samples import Samples, Writer, calibration_samples
from lrquant.data.vocabulary import require_known_tokens
from lrquant.errors import LRQuantError
from lrquant.model.model import Model


def calibration_of(
    asked: Calibrating,
    sources: Sources,
    model: Model,
    samples: Tensor | Feed | None,
    writer: Writer | None = None,
) -> Samples:
    """The samples to learn on: one's own, or those that the settings name.

    `writer` has those that the model writes itself.  Raises LRQuantError for token ids that the
    model does not have.
    """
    if samples is None:
        chosen = _named_samples(asked, sources, model, writer)
    else:
        chosen = _own_samples(samples)
    require_known_tokens(chosen.feed, chosen.name, model)
    return chosen


def tuning_samples_of(
    asked: Calibrating,
    sources: Sources,
    model: Model,
    samples: Tensor | Feed | None,
    count: int | None,
    writer: Writer | None = None,
) -> Samples:
    """The samples of the end-to-end stage: drawn apart, `count` of them, by default as many.

    One's own samples are those of the blocks too: there is nothing to draw from.
    """
    apart = replace(asked, count=asked.count if count is None else count, seed=asked.seed + 1)
    return calibration_of(apart, sources, model, samples, writer)


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


def _own_samples(samples: Tensor | Feed) -> Samples:
    empty = torch.empty((0, 0), dtype=torch.int64)
    if isinstance(samples, Feed):
        text = f"given samples, {len(samples)} with pictures"
        return Samples(empty, "given", "given", "given", samples.sha256(), text, samples)
    if not isinstance(samples, Tensor):
        raise LRQuantError(
            f"samples of type {type(samples).__name__}: expected token ids (samples, tokens), int64"
        )
    if samples.dim() != 2 or samples.dtype != torch.int64:
        raise LRQuantError(
            f"samples of shape {tuple(samples.shape)} and {samples.dtype}: expected token ids "
            "(samples, tokens), int64"
        )
    if not samples.numel():
        raise LRQuantError(f"samples of shape {tuple(samples.shape)}: no token in them; give some")
    digest = hashlib.sha256(samples.numpy().tobytes()).hexdigest()
    text = f"given tokens, {len(samples)} x {samples.shape[1]} = {samples.numel()} tokens"
    return Samples(samples, "given", "given", "given", digest, text)


def _text_samples(
    asked: Calibrating, sources: Sources, model: Model, count: int, writer: Writer | None
) -> Samples:
    if model.tokenizer is None:
        raise LRQuantError("no tokenizer: give one, or token ids as `samples`")
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
