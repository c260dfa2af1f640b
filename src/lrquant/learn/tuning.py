"""The end-to-end stage: scales, norms and codes of all blocks tuned by the model's own logits.

Of gradients there are those of one block at a time, of weights the codes, and where they lie
between codes if that is tuned; on the device, or on the host and there one block at a time.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrquant.blocks.head import Head
from lrquant.blocks.runner import Prepare
from lrquant.blocks.tuned import TunedBlock, tuned_bytes
from lrquant.blocks.workbench import Workbench, advance_full_precision, shape_view
from lrquant.config.groups import Learning
from lrquant.data.feeds import Feed
from lrquant.files.whole import JsonObject
from lrquant.ingredients.tuning import Tuning
from lrquant.learn.share import shared_inputs
from lrquant.learn.stage import carry_out
from lrquant.learn.whole_model import TunedSamples, WholeFit
from lrquant.model.device import dtype_name
from lrquant.runs.folder import RunFolder
from lrquant.runs.progress import Progress
from lrquant.runs.stages import StageFolder
from lrquant.team.team import ALONE, Team

logger = logging.getLogger("lrquant")
HELD_SHARE = 8  # one sample in so many says when to stop


def tune(
    workbench: Workbench,
    tuning: Tuning,
    learning: Learning,
    feed: Feed,
    folder: RunFolder,
    progress: Progress,
    towers: tuple[Prepare | None, Prepare | None] = (None, None),
    *,
    team: Team = ALONE,
) -> None:
    """Tune scales and norms of a run of which all blocks are learned, unless it is done already.

    The plan of the `workbench` is that of the blocks.
    Steps are as large as those of the blocks' `learning`.  `towers` stand before the first block of
    the full-precision and of the quantised model.  Of a `team` each member takes its share of the
    samples; the first alone reads and writes the folder.
    """
    stage = EndToEnd(workbench, tuning, learning, feed, folder, progress, towers, team)
    carry_out(stage)


@dataclass(frozen=True)
class EndToEnd:
    """The stage in which the whole language part is one unit.

    One sample in `HELD_SHARE` is not learned from: the epoch after which the divergence is least on
    these is kept, the start counted.
    """

    workbench: Workbench
    tuning: Tuning
    learning: Learning
    feed: Feed
    folder: RunFolder
    progress: Progress
    towers: tuple[Prepare | None, Prepare | None]
    team: Team = ALONE
    name = "tuned"

    @property
    def units(self) -> list[range]:
        """All blocks together."""
        return [range(len(self.workbench.model.blocks))]

    def kept(self) -> int:
        """1 if the blocks as they are have been tuned so before; what was tuned otherwise goes."""
        return self.team.first(self._kept)

    def _kept(self) -> int:
        own, of = tuned(self.folder), self._about
        if all((own.about(index) or {}).get("of") == of for index in self.units[0]):
            return 1
        own.forget()
        return 0

    @property
    def _about(self) -> JsonObject:
        """What must be the same for tuned blocks to be kept."""
        bench = self.workbench
        where = {"precision": dtype_name(bench.dtype), "device": bench.device.type}
        how = json.loads(json.dumps(dataclasses.asdict(self.tuning)))
        return {"run": self.folder.hash_of(len(bench.model.blocks)), **where, **how}

    def pass_through(self, unit: range) -> None:
        """Nothing stands after it."""

    def learn(self, unit: range) -> None:
        """Tune all blocks, and keep what came of it."""
        every = range(len(self.feed))
        held = self._samples(self.feed.only(every[::HELD_SHARE]), len(every))
        rest = self.feed.only([i for i in every if i % HELD_SHARE])
        learned = self._samples(rest, self.learning.batch_size)
        head = Head(self.workbench.model, self.workbench.device, self.workbench.dtype)
        home = self._home(learned)
        blocks = [self._block(index, (learned, held)).on(home) for index in unit]
        steps = self.tuning.tune_epochs * len(learned.share.counts)
        with self.progress.measuring("tuning end to end", steps, "steps") as told:
            classifies = self.workbench.model.architecture.reads_pixels
            fit = WholeFit(blocks, head, self.tuning, learned, held, told, classifies)
            record = fit.run()
        self.team.first(lambda: self._keep(fit.best, record))

    def _home(self, learned: TunedSamples) -> torch.device:
        """Where blocks live, and what enters each of them."""
        bench, batches = self.workbench, learned.entry.batches
        tokens = max(sum(math.prod(batches[i].shape) for i in own) for own in learned.share.steps)
        home = bench.home(kept_bytes(bench, self.tuning, tokens))
        if home != bench.device:
            logger.info("end to end: blocks live on the host, one at a time is on %s", bench.device)
        return home

    def _samples(self, feed: Feed, batch_size: int) -> TunedSamples:
        bench, together = self.workbench, self.learning.micro_batch_size
        entry, share = shared_inputs(bench, feed, batch_size, together, self.team)
        first, target = bench.streams(entry, 2)
        entry.embed_both(target, first, self.towers)
        return TunedSamples(entry, share, first, target)

    def _block(self, index: int, samples: Sequence[TunedSamples]) -> TunedBlock:
        """A block as the run learned it; the full-precision states move on through it."""
        bench = self.workbench
        stored = bench.stored(index)
        for each in samples:
            advance_full_precision(bench, index, stored, each.entry, each.target, each.target)
        view = bench.view(index, stored)
        view.load(self.team.first(lambda: self.folder.load_block(index)))
        return TunedBlock(self.tuning, view, bench.runner(index, view))

    def _keep(self, blocks: Sequence[dict[str, Tensor]], record: JsonObject) -> None:
        """Keep every block's parameters, and tell what came of them."""
        about = {"of": self._about, "record": record}
        for index, parameters in enumerate(blocks):
            tuned(self.folder).save(index, parameters, about)
        logger.info(
            "end to end: KL divergence on samples not learned from %.4g -> %.4g, epoch %d kept",
            *(record["held"][0], min(record["held"]), record["best_epoch"]),
        )


def kept_bytes(workbench: Workbench, tuning: Tuning, tokens: int) -> int:
    """All blocks while they are tuned, and what enters each of a step of so many tokens."""
    model = workbench.model
    every = range(len(model.blocks))
    views = (shape_view(model, index, workbench.plan) for index in every)
    states = (len(every) + 1) * tokens * model.state_size * 4
    return sum(tuned_bytes(view, tuning) for view in views) + states


def outcome_of_tuning(folder: RunFolder) -> JsonObject:
    """What came of a run's end-to-end stage, as results.json has it; nothing where it had none."""
    about = tuned(folder).about(0)
    return {} if about is None else {"end_to_end": about["record"]}


def tuned(folder: RunFolder) -> StageFolder:
    """A run's parameters that were tuned end to end."""
    return folder.stage(EndToEnd.name)
