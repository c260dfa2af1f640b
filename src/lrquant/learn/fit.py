"""Learning one block: the steps, the choice of its best parameters, the return from NaN."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lrquant.blocks.handed import HandedOn
from lrquant.blocks.inputs import BlockInputs
from lrquant.blocks.runner import BlockRunner
from lrquant.blocks.streams import Stream
from lrquant.blocks.view import BlockView
from lrquant.config.groups import Learning
from lrquant.errors import LRQuantError
from lrquant.learn.objective import Objective, loss_terms
from lrquant.learn.team import ALONE, Team, holds_for_all
from lrquant.learn.window import Step, Window

Progress = Callable[[int, float], None]
Learnable = BlockView | Window
Runner = BlockRunner | Window
Optimizers = list[torch.optim.Optimizer]


@dataclass
class FitReport:
    """What learning a block did.

    Losses are of `objective.measure`: `initial_loss` over the whole calibration set,
    `epoch_losses` the mean of an epoch's steps, `held_losses` over the whole set after an epoch
    with parameters held still (only with `keep_best`); `best_epoch` (0: the start) was kept.
    """

    objective: Objective
    initial_loss: float
    epoch_losses: list[float] = field(default_factory=list)
    held_losses: list[float] = field(default_factory=list)
    best_epoch: int | None = None
    non_finite: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class BlockData:
    """The samples as a block, or a window of `blocks` from `index` on, sees them.

    These are its quantised inputs, each branch's targets and the arguments.  Of a team each member
    has its share of the samples, in as many batches as every other.
    """

    index: int
    entry: BlockInputs
    inputs: Stream
    targets: tuple[Stream, ...]
    blocks: int = 1
    team: Team = ALONE
    _shares: list[float] = field(default_factory=list, init=False, repr=False)

    def batch_terms(
        self, runner: Runner, tensors: dict[str, Tensor], batch: int, kind: str
    ) -> tuple[Tensor, Tensor]:
        """Output of one batch and its loss terms."""
        return self._terms(self.output(runner, tensors, batch), batch, kind)

    def _terms(self, output: Tensor, batch: int, kind: str) -> tuple[Tensor, Tensor]:
        rows = self.entry.batches[batch]
        targets = [stream.read(rows) for stream in self.targets]
        return output, loss_terms(output, targets, kind, self.entry.weights(batch))

    def output(self, runner: Runner, tensors: dict[str, Tensor], batch: int) -> Tensor:
        """Output of one batch (batch, tokens, hidden)."""
        return self._output(runner, tensors, batch, self._handed(batch))

    def _handed(self, batch: int) -> HandedOn:
        return self.inputs.handed_on(self.entry.batches[batch])

    def _output(
        self, runner: Runner, tensors: dict[str, Tensor], batch: int, handed: HandedOn
    ) -> Tensor:
        states = self.inputs.read(self.entry.batches[batch], self.index)
        if isinstance(runner, Window):
            return runner(tensors, states, self._steps(batch, handed))
        return runner(tensors, states, self.entry.arguments(batch, self.index, handed))

    def _steps(self, batch: int, handed: HandedOn) -> list[Step]:
        rows = self.entry.batches[batch]
        indices = range(self.index, self.index + self.blocks)
        added = [None, *(self.inputs.added_before(rows, index) for index in indices[1:])]
        return [
            Step(self.entry.arguments(batch, index, handed), extra)
            for index, extra in zip(indices, added, strict=True)
        ]

    @torch.no_grad()
    def terms(
        self, runner: Runner, tensors: dict[str, Tensor], kind: str, *, advance: bool = False
    ) -> Tensor:
        """Mean loss terms over the whole set with tensors held still, (terms,) float32.

        With `advance` the outputs take the inputs' place: the stream moves on.
        """
        sums, counts = [], []
        for number, batch in enumerate(self.entry.batches):
            handed = self._handed(number)
            output, terms = self._terms(self._output(runner, tensors, number, handed), number, kind)
            counts.append(self.count(number))
            sums.append(terms.double() * counts[-1])
            if advance:
                self.inputs.hand_on(batch, handed, self.inputs)
                self.inputs.write(batch, output)
        total = torch.tensor(sum(counts), dtype=torch.float64, device=sums[0].device)
        return (self.team.sum(torch.stack(sums).sum(0)) / self.team.sum(total)).float()

    def whole(self, terms: Tensor, batch: int) -> Tensor:
        """The loss terms of a step, of which this member's batch has `terms`: all tokens count.

        They are means over the members' terms, as those of the whole set are over its batches.
        """
        return self.team.sum(terms.detach() * self.shares[batch])

    @property
    def shares(self) -> list[float]:
        """How much of each step is this member's batch: of all tokens, as they count."""
        if not self._shares:
            batches = range(len(self.entry.batches))
            counts = torch.tensor([self.count(batch) for batch in batches], dtype=torch.float64)
            self._shares.extend((counts / self.team.sum(counts)).tolist())
        return self._shares

    def count(self, batch: int) -> float:
        """Tokens of a batch, each as often as its weight says."""
        weights = self.entry.weights(batch)
        tokens = math.prod(self.entry.batches[batch].shape)
        return float(tokens if weights is None else weights.double().sum())


def fit_block(
    view: Learnable,
    runner: Runner,
    data: BlockData,
    learning: Learning,
    progress: Progress = lambda step, loss: None,
) -> FitReport:
    """Learn the view's parameters in place.

    With `keep_best` the parameters of the epoch after which the loss over the whole set was lowest
    are kept.  A non-finite loss ends the block at its best parameters so far (without `keep_best`,
    those whose epoch had the lowest mean loss); if a weight or the start itself is non-finite, an
    error names the first that is.
    """
    _check_stored(view, data.index)
    with torch.no_grad():
        tensors = view.tensors()
    initial = data.terms(runner, tensors, learning.loss)
    objective = Objective(initial, learning.dynamic_weights, learning.ema_init)
    report = FitReport(objective, objective.measure(initial))
    if not math.isfinite(report.initial_loss):
        raise LRQuantError(_first_non_finite(runner, tensors, data))
    if learning.epochs and view.parameters:
        _Fit(view, runner, data, learning, report, progress).run()
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
    ) -> None:
        self.view, self.runner, self.data = view, runner, data
        self.learning, self.report, self.progress = learning, report, progress
        self.start = self.best = copied(view.parameters)

    def run(self) -> None:
        """Learn; the view ends with parameters that need no gradient."""
        report, learning = self.report, self.learning
        steps = learning.epochs * len(self.data.entry.batches)
        optimizers = make_optimizers(self.view, learning.weight_decay, steps)
        best_loss, best_epoch = report.initial_loss, 0
        for epoch in range(1, learning.epochs + 1):
            mean = self._epoch(optimizers, epoch)
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
                self.best, best_loss, best_epoch = copied(self.view.parameters), held, epoch
        else:
            if learning.keep_best:
                self.view.parameters = self.best
            elif not math.isfinite(self._first_loss()):
                self._go_back(f"epoch {learning.epochs}, after its last step")
        report.best_epoch = best_epoch if learning.keep_best else None
        self.view.parameters = copied(self.view.parameters)
        self.view.harden_()

    def _epoch(self, optimizers: Optimizers, epoch: int) -> float | None:
        """One pass over the samples; the mean loss, or None as soon as something is not finite."""
        steps, total = len(self.data.entry.batches), 0.0
        unseen: list[Tensor] = []
        for batch in range(steps):
            loss = self._step(optimizers, batch)
            unseen.append(loss)
            if len(unseen) == unseen_steps(loss.device) or batch + 1 == steps:
                values = torch.stack(unseen).tolist()
                unseen.clear()
                if not all(map(math.isfinite, values)):
                    return None
                total = sum(values, total)
                first = (epoch - 1) * steps + batch + 2 - len(values)
                for step, value in enumerate(values, first):
                    self.progress(step, value)
        parameters = self.view.parameters.values()
        finite = torch.stack([torch.isfinite(each).all() for each in parameters]).all()
        return total / steps if holds_for_all(self.data.team, bool(finite)) else None

    def _step(self, optimizers: Optimizers, batch: int) -> Tensor:
        rest = batch, optimizers, self.report.objective, self.learning.loss
        return learning_step(self.view, self.runner, self.data, *rest)

    @torch.no_grad()
    def _held_loss(self) -> float:
        terms = self.data.terms(self.runner, self.view.tensors(), self.learning.loss)
        return self.report.objective.measure(terms)

    @torch.no_grad()
    def _first_loss(self) -> float:
        """Loss of the first step: what the last one, which no other step follows, has led to."""
        tensors = self.view.tensors()
        _, terms = self.data.batch_terms(self.runner, tensors, 0, self.learning.loss)
        return self.report.objective.measure(self.data.whole(terms, 0))

    def _go_back(self, event: str) -> None:
        """Take the best parameters, or the start if they, a step after their loss, are worse."""
        self.report.non_finite.append(f"{event}: back to the best parameters so far")
        self.view.parameters = self.best
        if not self._held_loss() <= self.report.initial_loss:
            self.view.parameters = self.start


def unseen_steps(device: torch.device) -> int:
    """After how many steps losses are looked at, for which all but a CPU have to be waited for."""
    return 1 if device.type == "cpu" else 32


def learning_step(
    view: Learnable,
    runner: Runner,
    data: BlockData,
    batch: int,
    optimizers: Optimizers,
    objective: Objective,
    kind: str,
) -> Tensor:
    """One step on one batch of every member; the objective's measure before it, on the device.

    Nothing in it waits for the device.
    """
    _, terms = data.batch_terms(runner, view.tensors(), batch, kind)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    whole = data.whole(terms, batch)
    (objective.loss(terms, whole) * data.shares[batch]).backward()
    share_gradients(list(view.parameters.values()), data.team)
    for optimizer in optimizers:
        optimizer.step()
    view.constrain_()
    return objective.measured(whole)


def share_gradients(parameters: Sequence[Tensor], team: Team) -> None:
    """Every member steps by the sum of all members' gradients, each of its share of the step.

    A parameter may be reached by the samples of some members alone, as an expert's is.
    """
    reached = torch.tensor([float(parameter.grad is not None) for parameter in parameters])
    for parameter, anywhere in zip(parameters, team.maximum(reached).tolist(), strict=True):
        if anywhere:
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = team.sum(own)


def make_optimizers(view: Learnable, weight_decay: float, steps: int) -> Optimizers:
    """What steps the parameters, which become leaves: one of each ingredient that has some."""
    stepped = [
        {name: each for name, each in block.parameters.items() if name not in block.still}
        for block in view.views
    ]
    for parameters in stepped:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
    pairs = [
        (parameters, each)
        for block, parameters in zip(view.views, stepped, strict=True)
        for each in block.ingredients
    ]
    own = [(each, list(each.own(parameters).values())) for parameters, each in pairs]
    return [each.optimizer(values, weight_decay, steps) for each, values in own if values]


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
            data.output(runner, tensors, number)
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
