"""Learning a model block by block: the vision tower first, where it has a scheme."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from lrquant.blocks.inputs import BlockInputs
from lrquant.blocks.runner import Prepare
from lrquant.blocks.streams import Stream
from lrquant.blocks.variants import as_learned, full_precision
from lrquant.blocks.view import BlockView
from lrquant.blocks.workbench import (
    WeightedObserver,
    Workbench,
    advance_full_precision,
    peak_memory,
)
from lrquant.config.config import Config
from lrquant.data.feeds import Feed
from lrquant.errors import LRQuantError
from lrquant.ingredients.base.statistics import ChannelStatistics
from lrquant.learn.diagnostics import measure_block
from lrquant.learn.fit import BlockData, FitReport, FitSettings, advance_quantized, fit_block
from lrquant.learn.identity import fit_settings
from lrquant.runs.block_file import BlockRecord
from lrquant.runs.folder import RunFolder
from lrquant.runs.progress import Progress

logger = logging.getLogger("lrquant")


def learn_model(
    workbench: Workbench,
    config: Config,
    feed: Feed,
    given: ChannelStatistics | None,
    folder: RunFolder,
    progress: Progress,
) -> None:
    """Learn the vision tower's blocks, if it has a scheme, and then the language part's.

    The language part learns on what the quantised tower gives it.
    """
    tower = workbench.tower
    plain = learned = full_precision(workbench).tower
    if config.vision_scheme is not None and tower is not None:
        pictures = require_pictures(config, feed)
        logger.info("vision tower: %d blocks", len(tower.model.blocks))
        learn_blocks(tower, config, pictures, None, folder.tower, progress)
        learned = as_learned(workbench, folder).tower
        logger.info("language part: %d blocks", len(workbench.model.blocks))
    learn_blocks(workbench, config, feed, given, folder, progress, (plain, learned))


def require_pictures(config: Config, feed: Feed) -> Feed:
    """The samples with pictures, on which the tower learns; refuses if there are none."""
    pictures = feed.with_pictures()
    if not len(pictures):
        raise LRQuantError(
            f"--vision-scheme {config.vision_scheme}: no calibration sample has a picture; give "
            "some with --calib-images"
        )
    return pictures


def learn_blocks(
    workbench: Workbench,
    config: Config,
    feed: Feed,
    given: ChannelStatistics | None,
    folder: RunFolder,
    progress: Progress,
    towers: tuple[Prepare | None, Prepare | None] = (None, None),
) -> None:
    """Learn every block that the folder does not hold yet, in order.

    Statistics are those `given`, or gathered from each block's full-precision pass.  `towers` is
    what stands before the first block of the full-precision and of the quantised model.
    """
    blocks = len(workbench.model.blocks)
    finished = folder.finished_blocks()
    if finished == blocks:
        return
    if finished:
        logger.info("resuming after block %d of %d", finished, blocks)
    later = [index for index in range(finished, blocks) if folder.block_path(index).is_file()]
    if later:
        logger.info(
            "%d kept blocks from %d on come after one that is missing or was learned anew: they "
            "are learned again",
            *(len(later), later[0]),
        )
    settings = fit_settings(config)
    entry = BlockInputs(workbench.model, feed, config.batch_size, workbench.device)
    full, quantized, *homologous = workbench.streams(entry, 3 if settings.two_branch else 2)
    before_full, before_quantized = towers
    entry.embed(full, before_full)
    if before_quantized is before_full:
        quantized.copy(full)
    else:
        entry.embed(quantized, before_quantized)
    learner = _Learner(
        *(workbench, config, settings, given, folder, progress),
        *(entry, full, quantized, homologous),
    )
    memory = partial(peak_memory, workbench.device)
    with progress.blocks(blocks, settings.epochs, len(entry.batches), memory):
        for index in range(blocks):
            if index < finished:
                learner.pass_through(index)
            else:
                learner.learn(index)


@dataclass(frozen=True)
class _Learner:
    """The calibration samples on their way through the blocks, in both models."""

    workbench: Workbench
    config: Config
    settings: FitSettings
    given: ChannelStatistics | None
    folder: RunFolder
    progress: Progress
    entry: BlockInputs
    full: Stream
    quantized: Stream
    homologous: list[Stream]

    def pass_through(self, index: int) -> None:
        """Send both streams through a block that was learned earlier."""
        _, view = self._advance_full(index, None)
        view.load(self.folder.load_block(index))
        data = BlockData(index, self.entry, self.quantized, (self.full,))
        with self.workbench.runner(index, view) as runner:
            advance_quantized(view, runner, data, self.settings.loss)
        self.progress.finished(index, None)

    def learn(self, index: int) -> None:
        """Learn a block, keep it, and send both streams through it."""
        started = time.monotonic()
        workbench, config, loss = self.workbench, self.config, self.settings.loss
        statistics = ChannelStatistics()
        ingredients = workbench.plan.ingredients
        observed = any(each.needs_statistics for each in ingredients) or (
            self.given is None and any(each.reads_statistics for each in ingredients)
        )
        stored, view = self._advance_full(index, statistics.observe if observed else None)
        if self.given is not None:
            statistics.maxima, statistics.midpoints = self.given.maxima, self.given.midpoints
        for stream in self.homologous:
            advance_full_precision(workbench, index, stored, self.entry, self.quantized, stream)
        view.initialize(statistics)
        data = BlockData(index, self.entry, self.quantized, (self.full, *self.homologous))
        with workbench.runner(index, view) as runner:
            report = fit_block(view, runner, data, self.settings, self.progress.stepper(index))
        if config.report:
            seen = measure_block(workbench, view, data, report.objective.measure, loss)
            self.folder.save_diagnostics(index, seen.figures, seen.tensors)
        with workbench.runner(index, view) as runner:
            final = advance_quantized(view, runner, data, loss)
        seconds = time.monotonic() - started
        final_loss = report.objective.measure(final)
        record = _record(self.folder, view, index, report, final_loss, seconds, workbench)
        self.progress.finished(index, record)

    def _advance_full(
        self, index: int, observer: WeightedObserver | None
    ) -> tuple[dict[str, Tensor], BlockView]:
        """The full-precision stream moves on; the block's own tensors, and how they are viewed."""
        bench, full = self.workbench, self.full
        stored = bench.stored(index)
        advance_full_precision(bench, index, stored, self.entry, full, full, observer)
        return stored, bench.view(index, stored)


def _record(
    folder: RunFolder,
    view: BlockView,
    index: int,
    report: FitReport,
    final_loss: float,
    seconds: float,
    workbench: Workbench,
) -> BlockRecord:
    record = BlockRecord(
        block=index,
        initial_loss=report.initial_loss,
        final_loss=final_loss,
        epoch_losses=report.epoch_losses,
        held_losses=report.held_losses,
        best_epoch=report.best_epoch,
        non_finite=report.non_finite,
        seconds=round(seconds, 3),
        peak_memory_bytes=peak_memory(workbench.device),
    )
    folder.save_block(view.parameters, record)
    logger.info(
        "block %d: loss %.6g -> %.6g, %.1f s%s",
        index,
        report.initial_loss,
        final_loss,
        seconds,
        "".join(f"; NOT FINITE at {event}" for event in report.non_finite),
    )
    return record
