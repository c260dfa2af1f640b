"""Gradients of a step: those of its batches, summed in the order of samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lrquant.learn.share import Share


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
