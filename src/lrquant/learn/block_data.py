"""The samples as a block, or a window of blocks, sees them, and the loss terms that they give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lrquant.blocks.handed import HandedOn
from lrquant.blocks.inputs import BlockInputs
from lrquant.blocks.runner import BlockRunner
from lrquant.blocks.streams import Stream
from lrquant.learn.objective import loss_terms
from lrquant.learn.share import Share
from lrquant.learn.window import Step, Window

Runner = BlockRunner | Window


@dataclass(frozen=True)
class BlockData:
    """The samples as a block, or a window of `blocks` from `index` on, sees them.

    These are its quantised inputs, each branch's targets and the arguments.  Of a team each member
    has its `share` of the samples; without one each batch is a step.
    """

    index: int
    entry: BlockInputs
    inputs: Stream
    targets: tuple[Stream, ...]
    blocks: int = 1
    share: Share | None = None

    @cached_property
    def shared(self) -> Share:
        """How the batches lie in steps."""
        return self.share or Share.alone(len(self.entry.batches))

    def batch_terms(
        self, runner: Runner, tensors: dict[str, Tensor], batch: int, kind: str
    ) -> tuple[Tensor, Tensor]:
        """Output of one batch and its loss terms."""
        return self._terms(runner, self.output(runner, tensors, batch), batch, kind)

    def _terms(
        self, runner: Runner, output: Tensor, batch: int, kind: str
    ) -> tuple[Tensor, Tensor]:
        rows = self.entry.batches[batch]
        targets = [stream.read(rows) for stream in self.targets]
        weights = self.entry.weights(batch)
        return output, loss_terms(output, targets, kind, weights, compiled=runner.compiled)

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
        self,
        runner: Runner,
        tensors: dict[str, Tensor],
        kind: str,
        *,
        advance: bool = False,
        steps: int | None = None,
    ) -> Tensor:
        """Mean loss terms with tensors held still, (terms,) float32.

        They are over the whole set, or the samples of its first `steps`.  With `advance` the
        outputs take the inputs' place: the stream moves on.
        """
        sums, counts = [], []
        for number, batch in enumerate(self.entry.batches[: self._batches(steps)]):
            handed = self._handed(number)
            states = self._output(runner, tensors, number, handed)
            output, terms = self._terms(runner, states, number, kind)
            counts.append(self.count(number))
            sums.append(terms.double() * counts[-1])
            if advance:
                self.inputs.hand_on(batch, handed, self.inputs)
                self.inputs.write(batch, output)
        if self.shared.team.size > 1:
            counts = self.shared.in_order(counts)
            sums = self.shared.in_order([each.cpu() for each in sums])
        total = torch.tensor(sum(counts), dtype=torch.float64)
        whole = torch.stack(sums).sum(0)
        return (whole / total.to(whole.device)).float().to(self.inputs.device)

    def _batches(self, steps: int | None) -> int | None:
        own = self.shared.steps
        return None if steps is None or steps >= len(own) else own[steps].start

    def whole(self, terms: Sequence[Tensor], step: int, like: Tensor) -> Tensor:
        """The loss terms (terms,) of a step, of which this member's own batches have `terms`.

        They are means over all of the step's batches, by their tokens; `like` has their shape.
        """
        pairs = zip(terms, self.shared.steps[step], strict=True)
        weighted = [own.detach() * self.shared.weights[batch] for own, batch in pairs]
        if self.shared.counts[step] == [1]:
            return weighted[0]
        rows = torch.stack(weighted) if weighted else like.new_empty((0, len(like)))
        return self.shared.step_sum(rows, step)

    def count(self, batch: int) -> float:
        """Tokens of a batch, each as often as its weight says."""
        return self.entry.count(batch)
