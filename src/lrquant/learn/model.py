"""Learning a model block by block: the vision tower first, where it has a scheme."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor

from lrquant.blocks.inputs import BlockInputs
from lrquant.blocks.runner import BlockRunner, Prepare
from lrquant.blocks.streams import Stream
from lrquant.blocks.variants import full_precision, tower_of
from lrquant.blocks.view import BlockView
from lrquant.blocks.workbench import (
    WeightedObserver,
    Workbench,
    advance_full_precision,
    begin_peak,
    peak_memory,
)
from lrquant.config.groups import Learning
from lrquant.data.feeds import Feed
from lrquant.errors import LRQuantError
from lrquant.ingredients.base.statistics import ChannelStatistics, ShareOfStatistics
from lrquant.ingredients.tuning import Tuning
from lrquant.learn.block_data import BlockData, Runner
from lrquant.learn.captured import recorder
from lrquant.learn.diagnostics import measure_block
from lrquant.learn.fit import (
    FitReport,
    Learnable,
    advance_quantized,
    require_same,
)
from lrquant.learn.groups import fit_in_groups
from lrquant.learn.routing import Routing
from lrquant.learn.share import Share, shared_inputs
from lrquant.learn.stage import carry_out, units_of
from lrquant.learn.starting import begin_at_best, strengths_of
from lrquant.learn.tuning import tune
from lrquant.learn.window import Window
from lrquant.runs.block_file import BlockRecord
from lrquant.runs.folder import RunFolder
from lrquant.runs.part import PartFolder
from lrquant.runs.progress import Progress
from lrquant.team.team import ALONE, Team

logger = logging.getLogger("lrquant")


def learn_model(
    workbench: Workbench,
    learning: Learning,
    feed: Feed,
    statistics: ChannelStatistics | None,
    folder: RunFolder,
    progress: Progress,
    diagnosed: bool = True,
    *,
    tuning: Feed | None = None,
    team: Team = ALONE,
) -> None:
    """Learn the vision tower's blocks, if it has a scheme, and then the language part's.

    The language part learns on what the quantised tower gives it.  `diagnosed` says whether what a
    block looks like is kept for a report.  `tuning` are the samples of an end-to-end stage, without
    them those of the blocks.  Of a `team` each member is given all samples and takes its share; the
    first alone reads and writes the folder.
    """
    ingredients, plan = workbench.plan.ingredients, workbench.plan.of_blocks
    workbench = replace(workbench, plan=plan)
    tower = workbench.tower
    plain = learned = full_precision(workbench).tower
    scheme = workbench.plan.schemes.tower
    if scheme is not None and tower is not None:
        pictures = require_pictures(feed, scheme.name)
        logger.info("vision tower: %d blocks", len(tower.model.blocks))
        learn_blocks(tower, learning, pictures, None, folder.tower, progress, diagnosed, team=team)
        learned = tower_of(tower, folder, team)
        logger.info("language part: %d blocks", len(workbench.model.blocks))
    towers = plain, learned
    rest = folder, progress, diagnosed, towers
    learn_blocks(workbench, learning, feed, statistics, *rest, team=team)
    for each in ingredients:
        if isinstance(each, Tuning):
            own = learning, tuning or feed, folder, progress, towers
            tune(workbench, each, *own, team=team)


def require_pictures(feed: Feed, scheme: str) -> Feed:
    """The samples with pictures, on which a tower learns `scheme`; refuses if there are none."""
    pictures = feed.with_pictures()
    if len(pictures) == 0:
        raise LRQuantError(
            f"--vision-scheme {scheme}: no calibration sample has a picture; give "
            "some with --calib-images"
        )
    return pictures


def learn_blocks(
    workbench: Workbench,
    learning: Learning,
    feed: Feed,
    statistics: ChannelStatistics | None,
    folder: PartFolder,
    progress: Progress,
    diagnosed: bool = True,
    towers: tuple[Prepare | None, Prepare | None] = (None, None),
    *,
    team: Team = ALONE,
) -> None:
    """Learn every block that the folder does not hold yet, in order.

    `statistics` are those of files, else gathered in each block's full-precision pass.  `towers`
    stand before the first block of the full-precision and of the quantised model.
    """
    blocks = len(workbench.model.blocks)
    finished = team.first(folder.finished_blocks)
    if finished == blocks:
        return
    team.first(partial(_tell_what_is_kept, folder, finished, blocks))
    steps = learning.batch_size, learning.micro_batch_size
    entry, share = shared_inputs(workbench, feed, *steps, team)
    full, quantized, *homologous = workbench.streams(entry, 3 if learning.two_branch else 2)
    entry.embed_both(full, quantized, towers)
    for stream in homologous:
        stream.added = quantized.added
    stage = BlockLearning(
        *(workbench, learning, statistics, folder, progress, diagnosed),
        *(entry, full, quantized, homologous, share),
    )
    memory = partial(peak_memory, workbench.device)
    with progress.blocks(blocks, learning.epochs, len(share.counts), memory):
        carry_out(stage)


def _tell_what_is_kept(folder: PartFolder, finished: int, blocks: int) -> None:
    if finished:
        logger.info("resuming after block %d of %d", finished, blocks)
    later = [index for index in range(finished, blocks) if folder.block_path(index).is_file()]
    if later:
        logger.info(
            "%d kept blocks from %d on come after one that is missing or was learned anew: they "
            "are learned again",
            *(len(later), later[0]),
        )


@dataclass(frozen=True)
class _Start:
    """What a block's parameters are made from; those of `starved` matrices stay there."""

    view: BlockView
    statistics: ChannelStatistics
    starved: Collection[str]


@dataclass(frozen=True)
class BlockLearning:
    """The stage in which blocks are learned: samples on their way through both models.

    Its units are windows of blocks; the files of a window's blocks are kept together.
    """

    workbench: Workbench
    learning: Learning
    statistics: ChannelStatistics | None
    folder: PartFolder
    progress: Progress
    diagnosed: bool
    entry: BlockInputs
    full: Stream
    quantized: Stream
    homologous: list[Stream]
    share: Share
    routing: dict[int, Routing] = field(default_factory=dict)
    name = "blocks"

    @property
    def team(self) -> Team:
        """The processes that learn."""
        return self.share.team

    @property
    def units(self) -> list[range]:
        """Windows of as many blocks as the settings say."""
        return units_of(len(self.workbench.model.blocks), self.learning.window)

    def kept(self) -> int:
        """How many windows are finished, as far as they follow one another."""
        finished = self.team.first(self.folder.finished_blocks)
        return sum(unit.stop <= finished for unit in self.units)

    def pass_through(self, unit: range) -> None:
        """Send both streams through blocks that were learned earlier."""
        for index in unit:
            _, view = self._advance_full(index, None)
            view.load(self.team.first(partial(self.folder.load_block, index)))
            data = BlockData(index, self.entry, self.quantized, (self.full,), share=self.share)
            with self.workbench.runner(index, view) as runner:
                advance_quantized(view, runner, data, self.learning.loss)
            self.progress.finished(index, None)

    def learn(self, unit: range) -> None:
        """Learn a window, keep its blocks, and send both streams through them."""
        started = time.monotonic()
        begin_peak(self.workbench.device)
        bench, before = self.workbench, self._copied_full(unit)
        starts = [self._start(index, unit) for index in unit]
        views = [start.view for start in starts]
        targets = (self.full, *self.homologous)
        data = BlockData(unit.start, self.entry, self.quantized, targets, len(unit), self.share)
        stepper = self.progress.stepper(unit.start, len(unit))
        runners = [bench.runner(index, view) for index, view in zip(unit, views, strict=True)]
        single = len(unit) == 1
        with runners[0] if single else Window(unit.start, views, runners) as runner:
            view = views[0] if isinstance(runner, BlockRunner) else runner
            strength = self._begin(view, runner, data, starts)
            rest = self.learning, stepper, recorder(bench, views, self.team)
            report = fit_in_groups(view, runner, data, *rest)
        require_same(self.team, view.parameters, unit.start)
        for index, view in zip(unit, views, strict=True):
            data = BlockData(index, self.entry, self.quantized, targets, share=self.share)
            if self.diagnosed:
                self.team.first(partial(self._diagnose, view, data, before, report))
            with bench.runner(index, view) as runner:
                final = advance_quantized(view, runner, data, self.learning.loss)
        self.routing.clear()
        seconds = (time.monotonic() - started) / len(unit)
        final_loss = report.objective.measure(final)
        for index, view in zip(unit, views, strict=True):
            record = self.team.first(
                partial(
                    _record, self.folder, view, index, report, final_loss, seconds, bench, strength
                )
            )
            self.progress.finished(index, record)

    def _copied_full(self, unit: range) -> Stream | None:
        """The full-precision stream as it is before a window, whose figures it is needed for."""
        if not self.diagnosed or len(unit) == 1:
            return None
        (copy,) = self.workbench.streams(self.entry, 1)
        copy.copy(self.full)
        return copy

    def _diagnose(
        self, view: BlockView, data: BlockData, before: Stream | None, report: FitReport
    ) -> None:
        """Keep figures of a learned block; `before` moves on, where the target is not after it.

        They are of the first member's samples alone.
        """
        bench = self.workbench
        if before is not None:
            advance_full_precision(bench, data.index, view.stored, self.entry, before, before)
            data = dataclasses.replace(data, targets=(before,))
        routing = self.routing.get(data.index)
        rest = report.objective.measure, self.learning.loss, routing
        seen = measure_block(bench, view, data, *rest)
        self.folder.save_diagnostics(data.index, seen.figures, seen.tensors)

    def _start(self, index: int, unit: range) -> _Start:
        """What a block of a window starts from; the full-precision streams move on through it."""
        bench, routing = self.workbench, Routing()
        seen = ChannelStatistics() if self.team.size == 1 else ShareOfStatistics()
        observe = seen.observe if self._observed else None
        stored, view = self._advance_full(index, observe, routing)
        statistics = seen.whole(self.share.in_order)
        if self.statistics is not None:
            of_files = self.statistics
            statistics.maxima, statistics.midpoints = of_files.maxima, of_files.midpoints
        for stream in self.homologous:
            before = self.quantized if index == unit.start else stream
            advance_full_precision(bench, index, stored, self.entry, before, stream)
        self.routing[index] = routing = routing.merged(self.team.each)
        starved = routing.starved(view, self.learning.expert_tokens)
        return _Start(view, statistics, starved)

    def _begin(
        self, view: Learnable, runner: Runner, data: BlockData, starts: Sequence[_Start]
    ) -> float | None:
        """Set the parameters of a window's blocks to their start; the strength, if it was tried."""

        def begin(strength: float) -> None:
            for start in starts:
                start.view.initialize(start.statistics, start.starved, strength)

        strengths = strengths_of(starts[0].view.ingredients)
        best = None
        if strengths:
            best = begin_at_best(view, runner, data, self.learning.loss, strengths, begin)
        else:
            begin(1.0)
        for index, start in enumerate(starts, data.index):
            _tell_of_starved(index, start.view, start.starved, self.learning.expert_tokens)
        return best

    @property
    def _observed(self) -> bool:
        """Whether statistics are gathered on the way."""
        plan = self.workbench.plan
        return plan.needs_statistics or (self.statistics is None and plan.reads_statistics)

    def _advance_full(
        self, index: int, observer: WeightedObserver | None, routing: Routing | None = None
    ) -> tuple[dict[str, Tensor], BlockView]:
        """The full-precision stream moves on; the block's own tensors, and how they are viewed."""
        bench, full = self.workbench, self.full
        stored = bench.stored(index)
        view = bench.view(index, stored)
        router = None if routing is None else partial(routing.see, view)
        advance_full_precision(bench, index, stored, self.entry, full, full, observer, router)
        return stored, view


def _tell_of_starved(index: int, view: BlockView, starved: Collection[str], fewest: int) -> None:
    experts = {matrix.expert for matrix in view.matrices.values()} - {None}
    few = {view.matrices[name].expert for name in starved}
    if few and view.still:
        logger.info(
            "block %d: %d of %d experts get fewer than %d tokens and keep their start",
            *(index, len(few), len(experts), fewest),
        )


def _record(
    folder: PartFolder,
    view: BlockView,
    index: int,
    report: FitReport,
    final_loss: float,
    seconds: float,
    workbench: Workbench,
    strength: float | None,
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
        start_strength=strength,
    )
    folder.save_block(view.kept, record)
    logger.info(
        "block %d: loss %.6g -> %.6g%s, %.1f s%s",
        index,
        report.initial_loss,
        final_loss,
        f" ({record.outcome})" if record.outcome else "",
        seconds,
        "".join(f"; NOT FINITE at {event}" for event in report.non_finite),
    )
    return record
