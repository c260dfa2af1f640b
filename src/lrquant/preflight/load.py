"""The load of a run: what each part learns on, and what is measured afterwards."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from lrquant.blocks.inputs import BlockInputs
from lrquant.blocks.workbench import Workbench
from lrquant.config.groups import Adapting, Learning
from lrquant.data.feeds import Feed
from lrquant.data.samples import Samples


@dataclass(frozen=True)
class Load:
    """How a part is learned, its `rows` of hidden states (tokens or patches), one batch of it.

    It is learned by so many `processes` together, each on a device of its own.
    """

    workbench: Workbench
    learning: Learning
    rows: int
    batch: Feed
    processes: int = 1

    @property
    def share(self) -> float:
        """The largest part of a step's samples, and of all, that one process has."""
        passes = max(1, self.learning.batch_size // self.learning.micro_batch_size)
        return math.ceil(passes / self.processes) / passes


@dataclass(frozen=True)
class TextLoad:
    """The texts to measure, in windows of `seqlen` tokens, those `against` full precision by name.

    With `compared`, full precision and round-to-nearest are measured beside; with `adapting`, the
    blocks adapted to each text too.  So many `processes` have a part of the windows each.
    """

    texts: Sequence[Samples]
    seqlen: int
    against: Collection[str] = ()
    compared: bool = False
    adapting: Adapting | None = None
    processes: int = 1


def language_load(
    workbench: Workbench, learning: Learning, calibration: Samples | None, lengths: Sequence[int]
) -> Load:
    """The blocks of a language model or of a classifier; without samples, of such `lengths`.

    A batch has the tokens of the longest sample and none of its pictures: blocks do not see them.
    """
    if calibration is not None and workbench.model.architecture.reads_pixels:
        return _pixel_load(workbench, learning, calibration.feed)
    if calibration is not None:
        lengths = [sample["input_ids"].shape[1] for sample in calibration.feed.inputs]
    samples = min(learning.batch_size, len(lengths))
    ids = torch.zeros((samples, max(lengths)), dtype=torch.int64)
    return Load(workbench, learning, sum(lengths), Feed.of_tokens(ids))


def tower_load(
    workbench: Workbench, learning: Learning, calibration: Samples | None
) -> Load | None:
    """The vision tower's blocks, None where it has no scheme or there are no pictures."""
    tower = workbench.tower
    if workbench.plan.schemes.tower is None or tower is None or calibration is None:
        return None
    pictures = calibration.feed.with_pictures()
    return _pixel_load(tower, learning, pictures) if len(pictures) else None


def _pixel_load(workbench: Workbench, learning: Learning, pictures: Feed) -> Load:
    entry = BlockInputs(workbench.model, pictures, learning.batch_size, workbench.device)
    first = entry.feed.only(range(entry.batches[0].samples.stop))
    return Load(workbench, learning, entry.shape[0], first)
