"""Calibration: what a run learns on, text, conversations with pictures, or samples of one's own."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lrquant.data.beginnings import beginning_of
from lrquant.data.feeds import Feed
from lrquant.data.prompts import mixed, picture_samples
from lrquant.data.samples import Samples, calibration_samples
from lrquant.data.vocabulary import require_known_tokens
from lrquant.errors import LRQuantError
from lrquant.model.model import Model


class CalibrationSettings(Protocol):
    """What is drawn from where, by the names of the settings that say so."""

    @property
    def calib_dataset(self) -> str: ...

    @property
    def calib_images(self) -> str | None: ...

    @property
    def calib_image_share(self) -> float: ...

    @property
    def image_token_weight(self) -> float: ...

    @property
    def nsamples(self) -> int: ...

    @property
    def seqlen(self) -> int: ...

    @property
    def seed(self) -> int: ...

    @property
    def bos(self) -> str: ...

    @property
    def text_column(self) -> str | None: ...

    @property
    def data_dir(self) -> str | None: ...

    @property
    def cache_dir(self) -> str | None: ...


def calibration_of(
    settings: CalibrationSettings, model: Model, samples: Tensor | Feed | None
) -> Samples:
    """The samples to learn on: one's own, or those that the settings name.

    Raises LRQuantError for token ids that the model does not have.
    """
    chosen = _named_samples(settings, model) if samples is None else _own_samples(samples)
    require_known_tokens(chosen.feed, chosen.name, model)
    return chosen


def _named_samples(settings: CalibrationSettings, model: Model) -> Samples:
    if settings.calib_images is None:
        if model.architecture.reads_pixels:
            raise LRQuantError(
                f"model {model.name}: a classifier of pictures; give some to calibrate on with "
                "--calib-images FOLDER"
            )
        return _text_samples(settings, model, settings.nsamples)
    count = settings.nsamples
    if not model.architecture.reads_pixels:
        count = max(1, round(count * settings.calib_image_share))
    weight = settings.image_token_weight
    pictures = picture_samples(Path(settings.calib_images), model, count, settings.seed, weight)
    if count == settings.nsamples:
        return pictures
    text = _text_samples(settings, model, settings.nsamples - len(pictures.feed))
    return mixed(pictures, text, settings.seed)


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


def _text_samples(settings: CalibrationSettings, model: Model, count: int) -> Samples:
    if model.tokenizer is None:
        raise LRQuantError("no tokenizer: give one, or token ids as `samples`")
    return calibration_samples(
        settings.calib_dataset,
        model.tokenizer,
        count,
        settings.seqlen,
        settings.seed,
        _folder(settings.data_dir),
        _folder(settings.cache_dir),
        beginning_of(model.tokenizer, model.config.model_type, settings.bos),
        settings.text_column,
    )


def _folder(path: str | None) -> Path | None:
    return None if path is None else Path(path)
