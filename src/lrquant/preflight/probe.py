"""A short measured probe: what one block costs on this machine under a run's own settings."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

import torch
from torch import Tensor

from lrquant.blocks.handed import States
from lrquant.blocks.inputs import BlockInputs
from lrquant.blocks.streams import Stream
from lrquant.blocks.view import BlockView
from lrquant.blocks.workbench import (
    WeightedObserver,
    Workbench,
    advance_full_precision,
    begin_peak,
    peak_memory,
)
from lrquant.config.groups import Learning
from lrquant.errors import LRQuantError
from lrquant.ingredients.base.statistics import ChannelStatistics
from lrquant.learn.block_data import BlockData, Runner
from lrquant.learn.fit import Learnable, learning_step, make_optimizers
from lrquant.learn.groups import groups_of
from lrquant.learn.objective import Objective
from lrquant.learn.share import Share, shared_inputs
from lrquant.learn.stage import units_of
from lrquant.learn.window import Window
from lrquant.model.sources import WeightSource
from lrquant.preflight.load import Load

T = TypeVar("T")
REPEATS = 3
LONGEST = 6.0  # seconds spent on repeating one measurement
_SEED = 0


@dataclass(frozen=True)
class BlockCosts:
    """Seconds that one block takes, and what memory learning it took.

    A batch: `observed` and `full` a full-precision pass with and without statistics, `held` a
    quantised pass with its loss, `step` a learning step (0 where nothing is learned).  A block:
    `read` its weights, `start` to initialise parameters, `weights` to make its weights from them,
    `freeze` to make the final ones.  It is learned in so many `groups` of experts, of which the
    first was measured.  `peak_memory` in bytes is that of this process on a CPU, of
    allocated memory on CUDA, with `streams` bytes of hidden states in it, for the batch's `rows`.
    """

    read: float
    observed: float
    full: float
    start: float
    weights: float
    held: float
    step: float
    freeze: float
    peak_memory: int
    streams: int
    rows: int
    groups: int = 1


class OneBlock(WeightSource):
    """A model's weights of which only those of a prefix are ever read; the others are ones."""

    def __init__(self, source: WeightSource, prefix: str) -> None:
        self.origin, self._source, self._prefix = source.origin, source, prefix

    def names(self) -> frozenset[str]:
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def tensor(self, name: str) -> Tensor:
        if name.startswith(self._prefix):
            return self._source.tensor(name)
        return torch.ones(()).expand(self.shape(name))

    def dtype(self, name: str) -> str:
        return self._source.dtype(name)

    def fingerprint(self) -> str:
        return self._source.fingerprint()


def probe_block(load: Load, index: int = 0) -> BlockCosts:
    """Learn a block's window for a few steps, on random hidden states of the shape of a batch.

    Scheme, method, device and precision are those of its settings; no weight outside the block is
    read and nothing is written.  Raises LRQuantError if the device's memory is short.
    """
    workbench, learning = load.workbench, load.learning
    model = workbench.model
    source = OneBlock(model.source, model.block_name(index) + ".")
    bench = dataclasses.replace(workbench, model=dataclasses.replace(model, source=source))
    steps = learning.batch_size, learning.micro_batch_size
    entry, share = shared_inputs(bench, load.batch, *steps)
    streams = bench.streams(entry, 3 if learning.two_branch else 2)
    entry.embed(streams[0])
    _hand_on(bench, entry, streams, index)
    generator = torch.Generator().manual_seed(_SEED)
    for batch in entry.batches:
        hidden = torch.randn((*batch.shape, model.state_size), generator=generator)
        for stream in streams:
            stream.write(batch, hidden)
    first, *rest = entry.batches[0].shape
    shape = first * len(entry.batches), *rest
    begin_peak(bench.device)
    try:
        clock = Clock(bench.device, bench.compiled)
        with bench.learning():
            return _measure(clock, bench, learning, index, entry, share, streams)
    except torch.OutOfMemoryError as error:
        raise LRQuantError(
            f"a step on {' x '.join(map(str, shape))} tokens of one block does not fit into "
            f"the memory of {bench.device}; use {fewer_experts(bench)}a smaller --batch_size or "
            "--seqlen"
        ) from error


def fewer_experts(bench: Workbench) -> str:
    """What to say first of a model of experts that are all learned at once; else nothing."""
    return "--expert_group 16, " if bench.model.has_experts and not bench.by_expert else ""


def _hand_on(bench: Workbench, entry: BlockInputs, streams: list[Stream], index: int) -> None:
    """Let the blocks before one leave in all streams what it may read; their weights are ones."""
    if bench.model.architecture.hands_on is None:
        return
    for before in range(index):
        advance_full_precision(bench, before, bench.stored(before), entry, streams[0], streams[0])
    for stream in streams[1:]:
        stream.handed = dict(streams[0].handed)


class Clock:
    """Median seconds of what is repeated; a first time that was short only warms up.

    One in which something is `compiled`, once for a run, is never what the others take.
    """

    def __init__(self, device: torch.device, compiled: bool = False) -> None:
        self.device, self.compiled = device, compiled

    def once(self, function: Callable[[], T]) -> tuple[float, T]:
        """Seconds of one call, and what it returned."""
        self._wait()
        started = time.perf_counter()
        result = function()
        self._wait()
        return time.perf_counter() - started, result

    def repeated(self, function: Callable[[], object]) -> float:
        """Median seconds of up to `REPEATS` calls after the first, of fewer if they take long."""
        first, _ = self.once(function)
        if first > LONGEST and not self.compiled:
            return first
        times: list[float] = []
        while len(times) < REPEATS and sum(times) < LONGEST:
            times.append(self.once(function)[0])
        return median(times)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _measure(
    clock: Clock,
    bench: Workbench,
    learning: Learning,
    index: int,
    entry: BlockInputs,
    share: Share,
    streams: list[Stream],
) -> BlockCosts:
    full, quantized, *_ = streams
    statistics = ChannelStatistics()
    read, stored = clock.once(lambda: bench.stored(index))

    def advance(observer: WeightedObserver | None) -> None:
        advance_full_precision(bench, index, stored, entry, quantized, full, observer)

    plain = clock.repeated(lambda: advance(None))
    observed = clock.repeated(lambda: advance(statistics.observe))
    view = bench.view(index, stored)
    start, _ = clock.once(lambda: view.initialize(statistics))
    groups = _begin_group(view, learning.expert_group)
    data = BlockData(index, entry, quantized, (full, *streams[2:]), share=share)
    with torch.no_grad():
        weights, tensors = clock.once(view.tensors)
    with bench.runner(index, view) as runner:
        held = clock.repeated(lambda: data.terms(runner, tensors, learning.loss))
        step, alone = 0.0, learning.window == 1
        if learning.epochs and view.moving and alone:
            step = _step_seconds(clock, view, runner, data, learning)
    if learning.epochs and not alone:
        step = _window_step_seconds(clock, bench, data, learning, view)
    freeze, _ = clock.once(view.frozen_tensors)
    return BlockCosts(
        read=read,
        observed=observed,
        full=plain,
        start=start,
        weights=weights,
        held=held,
        step=step,
        freeze=freeze,
        peak_memory=peak_memory(bench.device),
        streams=sum(stream.nbytes for stream in streams) + _nbytes(full.handed),
        rows=entry.shape[0],
        groups=groups,
    )


def _nbytes(handed: Mapping[int, States]) -> int:
    """What blocks before have left, which all streams of a probe share."""
    batches = (states for batch in handed.values() for states in batch.values())
    return sum(each.nbytes for states in batches for each in states)


def _begin_group(view: BlockView, size: int) -> int:
    """Let the first group of experts be learned, with all others' parameters as if they had been.

    Of how many groups.
    """
    if not size:
        return 1
    first, *rest = groups_of(view, size)
    view.still = first
    view.compact_()
    view.still = frozenset(view.parameters) - first
    return 1 + len(rest)


def _window_step_seconds(
    clock: Clock, bench: Workbench, data: BlockData, learning: Learning, own: BlockView
) -> float:
    """A block's share of a step of its window; 0 where nothing of that is learned."""
    units = units_of(len(bench.model.blocks), learning.window)
    (unit,) = (unit for unit in units if data.index in unit)
    views = [own if index == data.index else _started(bench, data, index) for index in unit]
    runners = [bench.runner(index, view) for index, view in zip(unit, views, strict=True)]
    data = dataclasses.replace(data, index=unit.start, blocks=len(unit))
    with Window(unit.start, views, runners) as window:
        if not window.parameters:
            return 0.0
        return _step_seconds(clock, window, window, data, learning) / len(unit)


def _started(bench: Workbench, data: BlockData, index: int) -> BlockView:
    """Another block of a window as it is before its first step."""
    stored, statistics = bench.stored(index), ChannelStatistics()
    full, observe = data.targets[0], statistics.observe
    advance_full_precision(bench, index, stored, data.entry, data.inputs, full, observe)
    view = bench.view(index, stored)
    view.initialize(statistics)
    return view


def _step_seconds(
    clock: Clock, view: Learnable, runner: Runner, data: BlockData, learning: Learning
) -> float:
    with torch.no_grad():
        initial = data.terms(runner, view.tensors(), learning.loss)
    objective = Objective(initial, learning.dynamic_weights, learning.ema_init)
    optimizers = make_optimizers(view, learning.weight_decay, steps=1)
    return clock.repeated(
        lambda: learning_step(view, runner, data, 0, optimizers, objective, learning.loss)
    )
