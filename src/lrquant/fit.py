"""Learning one block: the loss, the steps, the return to the last finite parameters."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lrquant.blocks import BlockInputs, BlockRunner, Stream
from lrquant.errors import LRQuantError
from lrquant.learn.equivalent import keep_scales_positive_
from lrquant.learn.view import BlockView
from lrquant.numerics.losses import mean_squared_error, negative_log_cosine

Progress = Callable[[int, float], None]


@dataclass(frozen=True)
class FitSettings:
    """How a block is learned; learning rates are AdamW's, constant."""

    epochs: int
    let_lr: float
    lwc_lr: float
    weight_decay: float
    loss: str


@dataclass
class FitReport:
    """What learning a block did: losses over the whole calibration set, one mean an epoch."""

    initial_loss: float
    epoch_losses: list[float] = field(default_factory=list)
    non_finite: list[str] = field(default_factory=list)
    seconds: float = 0.0


def reconstruction_loss(output: Tensor, target: Tensor, kind: str) -> Tensor:
    """MSE + NLC, or one of them, over block outputs (batch, tokens, hidden); float32 scalar."""
    terms = {"mse": mean_squared_error, "nlc": negative_log_cosine}
    return torch.stack([terms[part](output, target) for part in kind.split("+")]).sum()


@dataclass(frozen=True)
class BlockData:
    """The samples as one block sees them: quantised inputs, full-precision targets, arguments."""

    index: int
    entry: BlockInputs
    inputs: Stream
    targets: Stream

    @torch.no_grad()
    def loss(self, runner: BlockRunner, tensors: dict[str, Tensor], kind: str) -> float:
        """Loss over the whole calibration set with tensors held still."""
        total = 0.0
        for batch, samples in enumerate(self.entry.batches):
            output = runner(
                tensors, self.inputs.read(samples), self.entry.arguments(batch, self.index)
            )
            loss = reconstruction_loss(output, self.targets.read(samples), kind)
            total += float(loss) * (samples.stop - samples.start)
        return total / self.entry.shape[0]


def fit_block(
    view: BlockView,
    runner: BlockRunner,
    data: BlockData,
    settings: FitSettings,
    progress: Progress = lambda step, loss: None,
) -> FitReport:
    """Learn the view's parameters in place.

    A non-finite loss ends the block at its best parameters so far (those whose epoch had the lowest
    mean loss); if a weight or the start itself is non-finite, an error names the first that is.
    """
    started = time.monotonic()
    _check_stored(view, data.index)
    with torch.no_grad():
        tensors = view.tensors()
    report = FitReport(data.loss(runner, tensors, settings.loss))
    if not math.isfinite(report.initial_loss):
        raise LRQuantError(_first_non_finite(runner, tensors, data))
    if settings.epochs == 0 or not view.parameters:
        return report
    start = best = _copy(view.parameters)
    best_loss = report.initial_loss
    optimizer = make_optimizer(view.parameters, settings)
    for epoch in range(settings.epochs):
        mean_loss = _epoch(view, runner, data, optimizer, settings.loss, epoch, progress)
        if mean_loss is None:
            report.non_finite.append(f"epoch {epoch + 1}: back to the best parameters so far")
            _go_back(view, runner, data, settings.loss, best, start, report.initial_loss)
            break
        report.epoch_losses.append(mean_loss)
        if mean_loss <= best_loss:
            best, best_loss = _copy(view.parameters), mean_loss
    else:
        if not math.isfinite(_first_loss(view, runner, data, settings.loss)):
            event = f"epoch {settings.epochs}, after its last step"
            report.non_finite.append(f"{event}: back to the best parameters so far")
            _go_back(view, runner, data, settings.loss, best, start, report.initial_loss)
    view.parameters = _copy(view.parameters)
    report.seconds = time.monotonic() - started
    return report


def _epoch(
    view: BlockView,
    runner: BlockRunner,
    data: BlockData,
    optimizer: torch.optim.Optimizer,
    kind: str,
    epoch: int,
    progress: Progress,
) -> float | None:
    """One pass over the samples; the mean loss, or None as soon as a loss is not finite."""
    total = 0.0
    for batch in range(len(data.entry.batches)):
        value = learning_step(view, runner, data, batch, optimizer, kind)
        if not math.isfinite(value):
            return None
        total += value
        progress(epoch * len(data.entry.batches) + batch + 1, value)
    if not all(torch.isfinite(parameter).all() for parameter in view.parameters.values()):
        return None
    return total / len(data.entry.batches)


def learning_step(
    view: BlockView,
    runner: BlockRunner,
    data: BlockData,
    batch: int,
    optimizer: torch.optim.Optimizer,
    kind: str,
) -> float:
    """One step on one batch; the loss before it."""
    samples = data.entry.batches[batch]
    inputs, targets = data.inputs.read(samples), data.targets.read(samples)
    output = runner(view.tensors(), inputs, data.entry.arguments(batch, data.index))
    loss = reconstruction_loss(output, targets, kind)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    keep_scales_positive_(view.parameters)
    return float(loss.detach())


@torch.no_grad()
def _go_back(
    view: BlockView,
    runner: BlockRunner,
    data: BlockData,
    kind: str,
    best: dict[str, Tensor],
    start: dict[str, Tensor],
    start_loss: float,
) -> None:
    """Take the best parameters, or the start if they, a step later than their loss, are worse."""
    view.parameters = best
    if not data.loss(runner, view.tensors(), kind) <= start_loss:
        view.parameters = start


@torch.no_grad()
def _first_loss(view: BlockView, runner: BlockRunner, data: BlockData, kind: str) -> float:
    """Loss of the first batch: what the last step, which no other step follows, has led to."""
    samples = data.entry.batches[0]
    output = runner(view.tensors(), data.inputs.read(samples), data.entry.arguments(0, data.index))
    return float(reconstruction_loss(output, data.targets.read(samples), kind))


def make_optimizer(parameters: dict[str, Tensor], settings: FitSettings) -> torch.optim.Optimizer:
    """AdamW over the parameters, which become leaves, each kind at its own learning rate."""
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    rates = {"let": settings.let_lr, "lwc": settings.lwc_lr}
    groups = [
        {"params": [p for name, p in parameters.items() if name.startswith(kind + ".")], "lr": rate}
        for kind, rate in rates.items()
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, weight_decay=settings.weight_decay, fused=True)


def _copy(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def _check_stored(view: BlockView, index: int) -> None:
    """Refuse damaged weights by name: torch's attention on a CPU turns NaN queries into zeros."""
    for name, tensor in view.stored.items():
        if not all(torch.isfinite(extreme) for extreme in tensor.aminmax()):
            raise LRQuantError(
                f"block {index}: {name} holds a value that is not finite; the model's weights are "
                "damaged, download them again"
            )


def _first_non_finite(runner: BlockRunner, tensors: dict[str, Tensor], data: BlockData) -> str:
    """Name the first linear whose input is not finite, or say that the output is not."""
    seen: list[str] = []

    def observe(name: str, values: Tensor) -> None:
        if not torch.isfinite(values).all():
            seen.append(name)

    before, runner.observer = runner.observer, observe
    with torch.no_grad():
        for batch, samples in enumerate(data.entry.batches):
            arguments = data.entry.arguments(batch, data.index)
            runner(tensors, data.inputs.read(samples), arguments)
            if seen:
                break
    runner.observer = before
    where = f"the input of {seen[0]}" if seen else "the block's output"
    return (
        f"block {data.index}: {where} is not finite before any learning; check the model's "
        "weights, or use --precision float32"
    )
