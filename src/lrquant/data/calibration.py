"""What a run learns on: text, conversations with pictures, given samples, given statistics."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import torch
from torch import Tensor

from lrquant.config.config import Config, optional_path
from lrquant.data.beginnings import beginning_of
from lrquant.data.feeds import Feed
from lrquant.data.prompts import mixed, picture_samples
from lrquant.data.samples import Samples, calibration_samples
from lrquant.data.vocabulary import require_known_tokens
from lrquant.errors import LRQuantError
from lrquant.model.model import Model

logger = logging.getLogger("lrquant")


def calibration_of(config: Config, model: Model, given: Tensor | Feed | None) -> Samples:
    """The samples to learn on: those `given`, or those that the settings name.

    Raises LRQuantError for token ids that the model does not have.
    """
    samples = _given_samples(given) if given is not None else _named_samples(config, model)
    require_known_tokens(samples.feed, samples.name, model)
    return samples


def _named_samples(config: Config, model: Model) -> Samples:
    if config.calib_images is None:
        if model.architecture.reads_pixels:
            raise LRQuantError(
                f"model {model.name}: a classifier of pictures; give some to calibrate on with "
                "--calib-images FOLDER"
            )
        return _text_samples(config, model, config.nsamples)
    count = config.nsamples
    if not model.architecture.reads_pixels:
        count = max(1, round(count * config.calib_image_share))
    weight = config.image_token_weight
    pictures = picture_samples(Path(config.calib_images), model, count, config.seed, weight)
    if count == config.nsamples:
        return pictures
    text = _text_samples(config, model, config.nsamples - len(pictures.feed))
    return mixed(pictures, text, config.seed)


def _given_samples(given: Tensor | Feed) -> Samples:
    empty = torch.empty((0, 0), dtype=torch.int64)
    if isinstance(given, Feed):
        text = f"given samples, {len(given)} with pictures"
        return Samples(empty, "given", "given", "given", given.sha256(), text, given)
    if not isinstance(given, Tensor):
        raise LRQuantError(
            f"samples of type {type(given).__name__}: expected token ids (samples, tokens), int64"
        )
    if given.dim() != 2 or given.dtype != torch.int64:
        raise LRQuantError(
            f"samples of shape {tuple(given.shape)} and {given.dtype}: expected token ids "
            "(samples, tokens), int64"
        )
    if not given.numel():
        raise LRQuantError(f"samples of shape {tuple(given.shape)}: no token in them; give some")
    digest = hashlib.sha256(given.numpy().tobytes()).hexdigest()
    text = f"given tokens, {len(given)} x {given.shape[1]} = {given.numel()} tokens"
    return Samples(given, "given", "given", "given", digest, text)


def _text_samples(config: Config, model: Model, count: int) -> Samples:
    if model.tokenizer is None:
        raise LRQuantError("no tokenizer: give one, or token ids as `samples`")
    return calibration_samples(
        config.calib_dataset,
        model.tokenizer,
        count,
        config.seqlen,
        config.seed,
        optional_path(config.data_dir),
        optional_path(config.cache_dir),
        beginning_of(model.tokenizer, model.config.model_type, config.bos),
        config.text_column,
    )
