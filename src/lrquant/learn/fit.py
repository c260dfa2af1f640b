"""Learning one block: the steps, the choice of its best parameters, the return from NaN."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lrquant.blocks.view import BlockView
from lrquant.config.groups import Learning
from lrquant.errors import LRQuantError
from lrquant.learn.ahead import feeds_of
from lrquant.learn.block_data import BlockData, Fed, Runner
from lrquant.learn.captured import CapturedSteps, Record, Step
from lrquant.learn.gradients import Gradients
from lrquant.learn.objective import Objective
from lrquant.learn.window import Window
from lrquant.team.team import Team, holds_for_all

Progress = Callable[[int, float], None]
HELD_SAMPLES = 32  # of the first steps: they say which epoch was best
Learnable = BlockView | Window
Optimizers = list[torch.optim.Optimizer]


@dataclass
class FitReport:
    """What learning a block did.

    Losses are of `objective.measure`: `initial_loss` over the whole calibration set,
    `epoch_losses` the mean of an epoch's steps, `held_losses` over `HELD_SAMPLES` samples after an
    epoch with parameters held still (only with `keep_best`); `best_epoch` (0: the start) was kept.
    """

    objective: Objective
    initial_loss: float
    epoch_losses: list[float] = field(default_factory=list)
    held_losses: list[float] = field(default_factory=list)
    best_epoch: int | None = None
    non_finite: list[str] = field(default_factory=list)


def fit_block(
    view: Learnable,
    runner: Runner,
    data: BlockData,
    learning: Learning,
    progress: Progress = lambda step, loss: None,
    objective: Objective | None = None,
    record: Record | None = None,
) -> FitReport:
    """Learn the view's parameters in place.

    With `keep_best` the parameters of the epoch after which the loss over `HELD_SAMPLES` of the
    samples was lowest are kept.  A non-finite loss ends the block at its best parameters so far
    (without `keep_best`, those whose epoch had the lowest mean loss); if a weight or the start
    itself is non-finite, an error names the first that is.  An `objective` goes on with what it
    has seen.  With `record` steps are recorded and replayed, to the same bytes.
    """
    _check_stored(view, data.index)
    with torch.no_grad():
        tensors = view.tensors()
    initial = data.terms(runner, tensors, learning.loss)
    objective = objective or Objective(initial, learning.dynamic_weights, learning.ema_init)
    report = FitReport(objective, objective.measure(initial))
    if not math.isfinite(report.initial_loss):
        raise LRQuantError(_first_non_finite(runner, tensors, data))
    if learning.epochs and view.moving:
        _Fit(view, runner, data, learning, report, progress, record).run()
    return report


def advance_quantized(view: Learnable, runner: Runner, data: BlockData, kind: str) -> Tensor:
    """Move the quantised stream through what is frozen; its mean loss terms."""
    return data.terms(runner, view.frozen_tensors(), kind, advance=True)


class _Fit:
    """The epochs of one block."""

    def __init__(
        self,
        view: Learnable,
        runner: Runner,
        data: BlockData,
        learning: Learning,
        report: FitReport,
        progress: Progress,
        record: Record | None,
    ) -> None:
        self.view, self.runner, self.data = view, runner, data
        self.learning, self.report, self.progress = learning, report, progress
        self.record = record
        self.start = self.best = copied(view.moving)
        self.held_steps = held_steps(len(data.shared.counts), learning.batch_size)

    def run(self) -> None:
        """Learn; the view ends with parameters that need no gradient."""
        report, learning = self.report, self.learning
        steps = learning.epochs * len(self.data.shared.counts)
        take = self._steps(make_optimizers(self.view, learning.weight_decay, steps))
        self.start_loss = self._start_loss()
        best_loss, best_epoch = self.start_loss, 0
        for epoch in range(1, learning.epochs + 1):
            mean = self._epoch(take, epoch)
            if mean is None:
                self._go_back(f"epoch {epoch}")
                break
            report.epoch_losses.append(mean)
            held = mean
            if learning.keep_best:
                held = self._held_loss()
                if not math.isfinite(held):
                    self._go_back(f"epoch {epoch}, after its last step")
                    break
                report.held_losses.append(held)
            if held <= best_loss:
                self.best, best_loss, best_epoch = copied(self.view.moving), held, epoch
        else:
            if learning.keep_best:
                self._take(self.best)
            elif not math.isfinite(self._first_loss()):
                self._go_back(f"epoch {learning.epochs}, after its last step")
        report.best_epoch = best_epoch if learning.keep_best else None
        self._take(copied(self.view.moving))
        self.view.harden_()

    def _take(self, parameters: dict[str, Tensor]) -> None:
        """Let these be the parameters that learning changes."""
        self.view.parameters = {**self.view.parameters, **parameters}

    def _epoch(self, take: Step, epoch: int) -> float | None:
        """One pass over the samples; the mean loss, or None as soon as something is not finite."""
        steps, total = len(self.data.shared.counts), 0.0
        unseen: list[Tensor] = []
        for step, feeds in enumerate(feeds_of(self.data)):
            loss = take(feeds, step)
            unseen.append(loss)
            if len(unseen) == unseen_steps(loss.device) or step + 1 == steps:
                values = torch.stack(unseen).tolist()
                unseen.clear()
                if not all(map(math.isfinite, values)):
                    return None
                total = sum(values, total)
                first = (epoch - 1) * steps + step + 2 - len(values)
                for number, value in enumerate(values, first):
                    self.progress(number, value)
        parameters = self.view.moving.values()
        finite = torch.stack([torch.isfinite(each).all() for each in parameters]).all()
        return total / steps if holds_for_all(self.data.shared.team, bool(finite)) else None

    def _steps(self, optimizers: Optimizers) -> Step:
        """What takes a step on what its batches bring."""
        rest = optimizers, self.report.objective, self.learning.loss

        def taken(feeds: Sequence[Fed], step: int) -> Tensor:
            return step_on(feeds, step, self.view, self.runner, self.data, *rest)

        return taken if self.record is None else CapturedSteps(taken, self.record)

    def _start_loss(self) -> float:
        """That of the start over the samples that later losses are of."""
        if self.held_steps is None or not self.learning.keep_best:
            return self.report.initial_loss
        return self._held_loss()

    @torch.no_grad()
    def _held_loss(self) -> float:
        tensors, rest = self.view.tensors(), self.learning.loss
        terms = self.data.terms(self.runner, tensors, rest, steps=self.held_steps)
        return self.report.objective.measure(terms)

    @torch.no_grad()
    def _first_loss(self) -> float:
        """Loss of the first step: what the last one, which no other step follows, has led to."""
        data, objective, tensors = self.data, self.report.objective, self.view.tensors()
        rest = self.learning.loss
        feeds = data.fed_to(0)
        own = [fed.terms(self.runner, tensors, rest)[1] for fed in feeds]
        return objective.measure(data.whole(feeds, own, 0, objective.weights))

    def _go_back(self, event: str) -> None:
        """Take the best parameters, or the start if they, a step after their loss, are worse."""
        self.report.non_finite.append(f"{event}: back to the best parameters so far")
        self._take(self.best)
        if not self._held_loss() <= self.start_loss:
            self._take(self.start)


def held_steps(steps: int, batch_size: int) -> int | None:
    """Of how many steps the samples say which epoch was best; None for all of them."""
    enough = -(-HELD_SAMPLES // batch_size)
    return enough if enough < steps else None


def unseen_steps(device: torch.device) -> int:
    """After how many steps losses are looked at, for which all but a CPU have to be waited for."""
    return 1 if device.type == "cpu" else 32


def learning_step(
    view: Learnable,
    runner: Runner,
    data: BlockData,
    step: int,
    optimizers: Optimizers,
    objective: Objective,
    kind: str,
) -> Tensor:
    """One step of all members; the objective's measure before it, on the device.

    Its gradient is the sum of its batches', each by itself, in the order of samples.  Nothing in it
    waits for the device.
    """
    rest = optimizers, objective, kind
    return step_on(data.fed_to(step), step, view, runner, data, *rest)


def step_on(
    feeds: Sequence[Fed],
    step: int,
    view: Learnable,
    runner: Runner,
    data: BlockData,
    optimizers: Optimizers,
    objective: Objective,
    kind: str,
) -> Tensor:
    """The same on what its batches bring: all that differs from one step to the next."""
    tensors = view.tensors()
    terms = [fed.terms(runner, tensors, kind)[1] for fed in feeds]
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    whole = data.whole(feeds, terms, step, objective.weights)
    objective.see(whole)
    gradients = Gradients(list(view.moving.values()), view.by_expert)
    for fed in feeds:  # of which each lets go of what it computed
        loss = objective.loss(terms.pop(0)) * fed.share
        loss.backward(retain_graph=bool(terms))
        gradients.take_in()
    gradients.put_back(data.shared, step)
    for optimizer in optimizers:
        optimizer.step()
    view.constrain_()
    return objective.measured(whole)


def make_optimizers(view: Learnable, weight_decay: float, steps: int) -> Optimizers:
    """What steps the parameters, which become leaves: one of each ingredient that has some."""
    stepped = [copied(block.moving) for block in view.views]
    for block, parameters in zip(view.views, stepped, strict=True):
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        block.parameters = {**block.parameters, **parameters}
    pairs = [
        (parameters, each)
        for block, parameters in zip(view.views, stepped, strict=True)
        for each in block.ingredients
    ]
    own = [(each, list(each.own(parameters).values())) for parameters, each in pairs]
    return [each.optimizer(values, weight_decay, steps) for each, values in own if values]


def require_same(team: Team, parameters: dict[str, Tensor], block: int) -> None:
    """Refuse to go on where the members of a team have learned different parameters."""
    if team.size == 1:
        return
    digest = hashlib.sha256()
    for parameter in parameters.values():
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    if len(set(team.each(digest.hexdigest()))) > 1:
        raise LRQuantError(
            f"block {block}: the processes learned different parameters of the same gradients; "
            "start them on machines with the same devices, software and OMP_NUM_THREADS"
        )


def copied(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters as they are now, which need no gradient."""
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def _check_stored(view: Learnable, index: int) -> None:
    """Refuse damaged weights by name: torch's attention on a CPU turns NaN queries into zeros."""
    for number, block in enumerate(view.views, index):
        for name, tensor in block.stored.items():
            if not all(torch.isfinite(extreme) for extreme in tensor.aminmax()):
                raise LRQuantError(
                    f"block {number}: {name} holds a value that is not finite; the model's weights "
                    "are damaged, download them again"
                )


def _first_non_finite(runner: Runner, tensors: dict[str, Tensor], data: BlockData) -> str:
    """Name the first linear whose input is not finite, or say that the output is not."""
    seen: list[str] = []

    def observe(name: str, values: Tensor) -> None:
        if not torch.isfinite(values).all():
            seen.append(name)

    before, runner.observer = runner.observer, observe
    with torch.no_grad():
        for number in range(len(data.entry.batches)):
            data.fed(number).output(runner, tensors)
            if seen:
                break
    runner.observer = before
    block, where = data.index + data.blocks - 1, "the block's output"
    if seen:
        own, _, module = seen[0].partition(".") if isinstance(runner, Window) else ("", "", seen[0])
        block, where = int(own or block), f"the input of {module}"
    return (
        f"block {block}: {where} is not finite before any learning; check the model's weights, or "
        "use --precision float32"
    )
