"""Gradients of a step: those of its batches, summed in the order of samples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lrquant.learn.share import Share
from lrquant.numerics.positions import Positions


class Gradients:
    """What a step's own batches give some `parameters`, each taken in after its backward pass.

    With `whole` those that a batch has not reached have a gradient of 0 from it: an expert's, where
    all experts' parameters would be one.
    """

    def __init__(self, parameters: Sequence[Tensor], whole: bool = False) -> None:
        self._parameters, self._whole = parameters, whole
        self._rows: list[list[Tensor | None]] = []

    def take_in(self) -> None:
        """Take the gradients of one batch off the parameters."""
        self._rows.append([self._taken(parameter) for parameter in self._parameters])
        for parameter in self._parameters:
            parameter.grad = None

    def _taken(self, parameter: Tensor) -> Tensor | None:
        lacks = parameter.grad is None and self._whole
        return torch.zeros_like(parameter, requires_grad=False) if lacks else parameter.grad

    def put_back(self, share: Share, step: int) -> None:
        """Give each parameter the sum over all of the step's batches, in the order of samples.

        A parameter may be reached by some samples alone, as an expert's is: one that none has
        reached gets no gradient.  With it goes how many did.
        """
        if share.counts[step] == [1]:
            (sums,) = self._rows
            reached = [each is not None for each in sums]
        else:
            flat = share.step_sum(self._flat(), step)
            *sums, counts = flat.split(
                [*map(Tensor.numel, self._parameters), len(self._parameters)]
            )
            reached = self._reached(counts)
        for parameter, total, has in zip(self._parameters, sums, reached, strict=True):
            parameter.grad = total.view_as(parameter) if has and total is not None else None

    def _flat(self) -> Tensor:
        """One row a batch: all gradients, and 1 for each that there is."""
        like = self._parameters[0]
        width = sum(map(Tensor.numel, self._parameters)) + len(self._parameters)
        rows = like.new_zeros((len(self._rows), width), requires_grad=False)
        for row, gradients in zip(rows, self._rows, strict=True):
            start = 0
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                if gradient is not None:
                    row[start : start + parameter.numel()] = gradient.flatten()
                start += parameter.numel()
            row[start:] = 1
            for place, gradient in enumerate(gradients, start):
                if gradient is None:
                    row[place] = 0
        return rows

    def _reached(self, counts: Tensor) -> list[bool]:
        """Which parameters a batch has reached; asks the device only where it may be another's."""
        own = [any(each is not None for each in column) for column in zip(*self._rows, strict=True)]
        if own and all(own):
            return own
        return [count > 0 for count in counts.tolist()]


class PositionGradients:
    """What a step's own batches give to where a block's weights lie, each (out, in).

    A lone process has but their sum so far, in float32 once it is of two.
    """

    def __init__(self, positions: Iterable[Positions], alone: bool) -> None:
        self._alone = alone
        self._rows: list[tuple[Positions, list[Tensor]]] = [(each, []) for each in positions]

    def take_in(self) -> None:
        """Take the gradients of one batch off the positions, some of which it may not reach."""
        for positions, rows in self._rows:
            gradient, positions.gradient = positions.gradient, None
            if gradient is None:
                gradient = torch.zeros_like(positions.offsets, dtype=torch.float32)
            if rows and self._alone:
                gradient = rows.pop().float() + gradient.float()
            rows.append(gradient)

    def put_back(self, share: Share, step: int) -> None:
        """Give all positions the sum over all of the step's batches, in the order of samples."""
        for positions, rows in self._rows:
            positions.gradient = rows[0] if self._alone else _sum_of(rows, positions, share, step)
            rows.clear()


def _sum_of(gradients: list[Tensor], positions: Positions, share: Share, step: int) -> Tensor:
    offsets = positions.offsets
    rows = torch.empty((len(gradients), offsets.numel()), device=offsets.device)
    for row, gradient in zip(rows, gradients, strict=True):
        row.copy_(gradient.flatten())
    return share.step_sum(rows, step).view_as(offsets)
