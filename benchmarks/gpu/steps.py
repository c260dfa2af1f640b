"""Learning steps of one block of a shape, by the package's own functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gpu.shapes import Shape, model_of
from lrquant.blocks.inputs import BlockInputs
from lrquant.blocks.plan import Plan, learned_by
from lrquant.blocks.runner import BlockRunner
from lrquant.blocks.streams import Stream
from lrquant.blocks.view import BlockView
from lrquant.blocks.workbench import Workbench, advance_full_precision
from lrquant.config.groups import Learning
from lrquant.config.scheme import Scheme
from lrquant.config.schemes import Schemes
from lrquant.ingredients.base.statistics import ChannelStatistics
from lrquant.learn.ahead import feeds_of
from lrquant.learn.block_data import BlockData, Fed
from lrquant.learn.captured import CapturedSteps, cuda_graphs
from lrquant.learn.fit import Optimizers, make_optimizers, step_on
from lrquant.learn.objective import Objective

LOSS = "mse+nlc"


@dataclass(frozen=True)
class Method:
    """A scheme, and what is learned for it: LRQuant+ with `plus`, scales between modules with
    `let`, which way weights are rounded, and clipping of activations (`lac`)."""

    scheme: str
    let: bool = False
    plus: bool = True
    rounding: bool = False
    lac: bool = False

    @property
    def name(self) -> str:
        """In short, for a table."""
        more = f"{', rounding' * self.rounding}{', clipped activations' * self.lac}"
        return f"{self.scheme} LRQuant{'+' if self.plus else ''}{more}"

    @property
    def plan(self) -> Plan:
        """The same for a workbench."""
        learned = learned_by(
            lwc=True, let=self.let, rotation=self.plus, rounding=self.rounding, lac=self.lac
        )
        return Plan(Schemes(Scheme.parse(self.scheme)), learned)


W4A4, W4A16 = Method("W4A4", let=True), Method("W4A16g128")


@dataclass
class Prepared:
    """A block that is ready for a step on any of its samples."""

    bench: Workbench
    entry: BlockInputs
    view: BlockView
    runner: BlockRunner
    data: BlockData
    streams: list[Stream]
    statistics: ChannelStatistics
    optimizers: Optimizers
    objective: Objective

    def step(self, batch: int = 0) -> Tensor:
        """One learning step; its loss, on the device."""
        with self.runner, self.bench.learning():
            return self._taken(self.data.fed_to(batch), batch)

    def _taken(self, feeds: Sequence[Fed], step: int) -> Tensor:
        rest = self.view, self.runner, self.data, self.optimizers, self.objective, LOSS
        return step_on(feeds, step, *rest)

    def epoch(self) -> None:
        """A step on each of its samples, read as a run reads them."""
        with self.runner, self.bench.learning():
            for step, feeds in enumerate(feeds_of(self.data)):
                self._taken(feeds, step)

    def replayed(self) -> Callable[[], Tensor]:
        """What takes steps on the first sample as `--cuda-graphs` does."""
        steps = CapturedSteps(self._taken, cuda_graphs())

        def step() -> Tensor:
            with self.runner, self.bench.learning():
                return steps(self.data.fed_to(0), 0)

        return step

    @torch.no_grad()
    def held(self) -> Tensor:
        """The loss terms over all samples with parameters held still."""
        with self.runner:
            return self.data.terms(self.runner, self.view.tensors(), LOSS)

    def advance(self, statistics: ChannelStatistics | None = None) -> None:
        """Send all samples through the full-precision block."""
        observe = None if statistics is None else statistics.observe
        stored, full = self.view.stored, self.streams[0]
        advance_full_precision(self.bench, 0, stored, self.entry, full, full, observe)


def bench_of(
    shape: Shape,
    method: Method,
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    drawn_on: torch.device | None = None,
) -> Workbench:
    """A workbench on one block of a shape, whose weights are drawn where it computes, or there."""
    model = model_of(shape, drawn_on or device, tokens)
    return Workbench(model, device, dtype, "device", plan=method.plan, deterministic=True)


def prepare(
    bench: Workbench, method: Method, samples: int, tokens: int, batch: int = 1
) -> Prepared:
    """A block of random weights, its statistics gathered and its parameters at their start."""
    ids = torch.randint(0, 256, (samples, tokens), generator=torch.Generator().manual_seed(0))
    entry = BlockInputs(bench.model, ids, batch, bench.device)
    streams = bench.streams(entry, 3 if method.plus else 2)
    entry.embed(streams[0])
    for stream in streams[1:]:
        stream.copy(streams[0])
    view = bench.view(0, bench.stored(0))
    statistics = ChannelStatistics()
    if bench.device.type == "meta":
        view.parameters = {
            name: torch.empty(shape, device=bench.device)
            for name, shape in view.parameter_shapes().items()
        }
    else:
        advance_full_precision(
            bench, 0, view.stored, entry, streams[0], streams[0], statistics.observe
        )
        view.initialize(statistics)
    full, quantized, *homologous = streams
    data = BlockData(0, entry, quantized, (full, *homologous))
    learning = Learning(1, 0.0, LOSS, dynamic_weights=method.plus)
    optimizers = make_optimizers(view, learning.weight_decay, steps=1)
    ones = torch.ones(2, device=bench.device)
    objective = Objective(ones, learning.dynamic_weights, learning.ema_init)
    runner = bench.runner(0, view)
    return Prepared(bench, entry, view, runner, data, streams, statistics, optimizers, objective)


def compiled(bench: Workbench) -> Workbench:
    """The same with compiled quantizers."""
    return replace(bench, compiled=True)
