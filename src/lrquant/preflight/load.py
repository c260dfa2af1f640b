"""The load of each part of a model: all hidden states to learn on, and one batch to probe with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lrquant.blocks.inputs import BlockInputs
from lrquant.blocks.workbench import Workbench
from lrquant.config.config import Config
from lrquant.data.feeds import Feed
from lrquant.data.samples import Samples


@dataclass(frozen=True)
class Load:
    """A part's settings, its `rows` of hidden states (tokens or patches), and one batch of it."""

    workbench: Workbench
    config: Config
    rows: int
    batch: Feed


def language_load(workbench: Workbench, config: Config, calibration: Samples | None) -> Load:
    """The blocks of a language model or of a classifier; without samples as the settings say.

    A batch has the tokens of the longest sample and none of its pictures: blocks do not see them.
    """
    if calibration is not None and workbench.model.architecture.reads_pixels:
        return _pixel_load(workbench, config, calibration.feed)
    lengths = [config.seqlen] * config.nsamples
    if calibration is not None:
        lengths = [sample["input_ids"].shape[1] for sample in calibration.feed.inputs]
    samples = min(config.batch_size, len(lengths))
    ids = torch.zeros((samples, max(lengths)), dtype=torch.int64)
    return Load(workbench, config, sum(lengths), Feed.of_tokens(ids))


def tower_load(workbench: Workbench, config: Config, calibration: Samples | None) -> Load | None:
    """The vision tower's blocks, None where it has no scheme or there are no pictures."""
    tower = workbench.tower
    if config.vision_scheme is None or tower is None or calibration is None:
        return None
    pictures = calibration.feed.with_pictures()
    return _pixel_load(tower, config, pictures) if len(pictures) else None


def _pixel_load(workbench: Workbench, config: Config, pictures: Feed) -> Load:
    entry = BlockInputs(workbench.model, pictures, config.batch_size, workbench.device)
    first = entry.feed.only(range(entry.batches[0].samples.stop))
    return Load(workbench, config, entry.shape[0], first)
