"""The samples as a block, or a window of blocks, sees them, and the loss terms that they give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

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


class Fed(NamedTuple):
    """What a batch brings to a block, or to a window of `steps`, on the computing device.

    These are the states (batch, tokens, hidden) that the first block reads and each branch's
    target, float32, how much each token counts (batch, tokens; None: all alike), and how much the
    batch is of its step.
    """

    states: Tensor
    steps: tuple[Step, ...]
    targets: tuple[Tensor, ...]
    weights: Tensor | None
    share: float

    def output(self, runner: Runner, tensors: dict[str, Tensor]) -> Tensor:
        """Output (batch, tokens, hidden)."""
        if isinstance(runner, Window):
            return runner(tensors, self.states, self.steps)
        (step,) = self.steps
        return runner(tensors, self.states, step.arguments)

    def terms(self, runner: Runner, tensors: dict[str, Tensor], kind: str) -> tuple[Tensor, Tensor]:
        """Output and its loss terms."""
        output = self.output(runner, tensors)
        rest = self.targets, kind, self.weights
        return output, loss_terms(output, *rest, compiled=runner.compiled)


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

    def fed(self, batch: int, handed: HandedOn | None = None) -> Fed:
        """What a batch brings; the block reads and sets what is `handed` on."""
        rows = self.entry.batches[batch]
        handed = self.inputs.handed_on(rows) if handed is None else handed
        return Fed(
            self.inputs.read(rows, self.index),
            self._steps(batch, handed),
            tuple(stream.read(rows) for stream in self.targets),
            self.entry.weights(batch),
            self.shared.weights[batch],
        )

    def fed_to(self, step: int) -> list[Fed]:
        """What this member's own batches bring to a step."""
        return [self.fed(batch) for batch in self.shared.steps[step]]

    def _steps(self, batch: int, handed: HandedOn) -> tuple[Step, ...]:
        rows = self.entry.batches[batch]
        indices = range(self.index, self.index + self.blocks)
        added = [None, *(self.inputs.added_before(rows, index) for index in indices[1:])]
        return tuple(
            Step(self.entry.arguments(batch, index, handed), extra)
            for index, extra in zip(indices, added, strict=True)
        )

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
            handed = self.inputs.handed_on(batch)
            output, terms = self.fed(number, handed).terms(runner, tensors, kind)
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

    def whole(
        self, feeds: Sequence[Fed], terms: Sequence[Tensor], step: int, like: Tensor
    ) -> Tensor:
        """The loss terms (terms,) of a step, of which this member's own `feeds` have `terms`.

        They are means over all of the step's batches, by their tokens; `like` has their shape.
        """
        weighted = [own.detach() * fed.share for fed, own in zip(feeds, terms, strict=True)]
        if self.shared.counts[step] == [1]:
            return weighted[0]
        rows = torch.stack(weighted) if weighted else like.new_empty((0, len(like)))
        return self.shared.step_sum(rows, step)

    def count(self, batch: int) -> float:
        """Tokens of a batch, each as often as its weight says."""
        return self.entry.count(batch)
