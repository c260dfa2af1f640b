"""Steps of a whole model by its logits: back block by block, each of which is stepped at once.

A step sends its batches through all blocks, keeps what enters each, and computes each once more on
the way back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from lrquant.blocks.handed import HandedOn, leaves, owe_
from lrquant.blocks.head import HEAD_TOKENS, Head
from lrquant.blocks.inputs import BlockInputs
from lrquant.blocks.streams import Stream
from lrquant.blocks.tuned import TunedBlock
from lrquant.errors import LRQuantError
from lrquant.files.whole import JsonObject
from lrquant.ingredients.tuning import Tuning
from lrquant.learn.fit import copied
from lrquant.learn.gradients import Gradients
from lrquant.learn.share import Share
from lrquant.numerics.losses import kl_divergence
from lrquant.numerics.positions import Positions
from lrquant.team.team import holds_for_all


@dataclass(frozen=True)
class TunedSamples:
    """Samples, their first hidden states in the quantised model, and the last in full precision."""

    entry: BlockInputs
    share: Share
    first: Stream
    target: Stream


@dataclass
class _Passed:
    """A batch that went through all blocks: what entered each, and what those before left it.

    `gradient` is that of the loss to what left the block that is stepped next, `owed` those to what
    blocks left for later ones.
    """

    batch: int
    inputs: list[Tensor]
    handed: list[HandedOn]
    gradient: Tensor
    owed: dict[str, list[Tensor]] = field(default_factory=dict)


@dataclass
class WholeFit:
    """Epochs over the whole model."""

    blocks: Sequence[TunedBlock]
    head: Head
    tuning: Tuning
    learned: TunedSamples
    held: TunedSamples
    told: Callable[[int], None]
    classifies: bool = False
    best: list[dict[str, Tensor]] = field(default_factory=list)

    def run(self) -> JsonObject:
        """Tune; the record of what came of it.  `best` then is what is to be kept of each block."""
        steps = self.tuning.tune_epochs * len(self.learned.share.counts)
        for block in self.blocks:
            block.begin(steps)
        losses, held = [], [self._divergence(self.held)]
        if not math.isfinite(held[0]):
            raise LRQuantError(
                "end to end: the learned model's logits are not finite; use --precision float32"
            )
        best_epoch = 0
        self._keep()
        for epoch in range(1, self.tuning.tune_epochs + 1):
            losses.append(self._epoch(epoch))
            held.append(self._divergence(self.held))
            if held[-1] < min(held[:-1]):
                self._keep()
                best_epoch = epoch
            if not holds_for_all(self.learned.share.team, math.isfinite(held[-1])):
                break
        finite = [each for each in held if math.isfinite(each)]
        return {"losses": losses, "held": finite, "best_epoch": best_epoch}

    def _keep(self) -> None:
        kept = [self.tuning.kept(block.parameters) for block in self.blocks]
        self.best = [copied(parameters) for parameters in kept]

    def _epoch(self, epoch: int) -> float:
        """One pass over the steps, shuffled; the mean divergence of them."""
        share = self.learned.share
        steps = len(share.counts)
        generator = torch.Generator().manual_seed(epoch)
        order = torch.randperm(steps, generator=generator).tolist()
        own: dict[int, float] = {}
        for number, step in enumerate(order):
            own |= self._step(step)
            self.told((epoch - 1) * steps + number)
        every = iter(share.in_order([own[batch] for batch in range(len(own))]))
        losses = [sum(islice(every, sum(counts))) for counts in share.counts]
        return sum(losses[step] for step in order) / steps

    def _step(self, step: int) -> dict[int, float]:
        """Step every block, the last one first; what each own batch adds to the divergence."""
        samples, losses, passed = self.learned, {}, []
        for batch in samples.share.steps[step]:
            inputs, handed = self._through(samples, batch)
            loss, gradient = self._of_logits(inputs.pop(), samples, batch)
            losses[batch] = loss * samples.share.weights[batch]
            passed.append(_Passed(batch, inputs, handed, gradient * samples.share.weights[batch]))
        for index in reversed(range(len(self.blocks))):
            block = self.blocks[index]
            factors = Gradients(list(block.factors.values()))
            positions: dict[str, list[Tensor]] = {name: [] for name in block.positions}
            for each in passed:
                self._back(index, each)
                factors.take_in()
                for name, own in block.positions.items():
                    positions[name].append(_taken(own))
            factors.put_back(samples.share, step)
            for name, own in block.positions.items():
                own.gradient = _sum_of(positions[name], own.offsets, samples.share, step)
            block.step()
        return losses

    def _back(self, index: int, passed: _Passed) -> None:
        """Compute a block once more, and take the gradient through it."""
        states, read = passed.inputs.pop().requires_grad_(True), leaves(passed.handed.pop())
        arguments = self.learned.entry.arguments(passed.batch, index, read)
        with torch.enable_grad():
            output = self.blocks[index](states, arguments)
        owed = passed.owed
        left = [(each, owed.pop(name)) for name, each in read.new.items() if name in owed]
        outputs = [output, *(tensor for tensors, _ in left for tensor in tensors)]
        torch.autograd.backward(outputs, [passed.gradient, *(g for _, each in left for g in each)])
        passed.gradient = _gradient_of(states)
        owe_(owed, read)

    @torch.no_grad()
    def _through(self, samples: TunedSamples, batch: int) -> tuple[list[Tensor], list[HandedOn]]:
        """What enters each block, and what leaves the last; and what those before it left each."""
        rows = samples.entry.batches[batch]
        states = [samples.first.read(rows)]
        handed, before = HandedOn({}), []
        for index, block in enumerate(self.blocks):
            added = samples.first.added_before(rows, index)
            if added is not None:
                states[-1] = states[-1] + added
            before.append(HandedOn(handed))
            states.append(block(states[-1], samples.entry.arguments(batch, index, handed)))
        return states, before

    def _of_logits(self, states: Tensor, samples: TunedSamples, batch: int) -> tuple[float, Tensor]:
        """The divergence of a batch, mean over its tokens, and its gradient to the last states."""
        target = samples.target.read(samples.entry.batches[batch])
        weights = samples.entry.weights(batch)
        if weights is None:
            weights = torch.ones(states.shape[:-1], device=states.device)
        weights = weights / weights.sum()
        gradient, total = torch.empty_like(states), 0.0
        at_once = max(HEAD_TOKENS, states.shape[1] if self.classifies else 0)
        for start in range(0, states.shape[1], at_once):
            tokens = slice(start, start + at_once)
            own = states[:, tokens].detach().requires_grad_(torch.is_grad_enabled())
            expected = self.head(target[:, tokens]).float()
            divergence = kl_divergence(self.head.logits(own).float(), expected)
            loss = divergence.mean() if self.classifies else (divergence * weights[:, tokens]).sum()
            if own.requires_grad:
                loss.backward()
                gradient[:, tokens] = _gradient_of(own)
            total += float(loss.detach())
        return total, gradient

    @torch.no_grad()
    def _divergence(self, samples: TunedSamples) -> float:
        """Mean divergence over all samples, as they are."""
        losses = [
            self._of_logits(self._through(samples, batch)[0][-1], samples, batch)[0]
            for batch in range(len(samples.entry.batches))
        ]
        every = samples.share.in_order(losses)
        return sum(every) / len(every)


def _taken(positions: Positions) -> Tensor:
    """The gradient to where a matrix's weights lie, which some samples may not reach; it goes."""
    own, positions.gradient = positions.gradient, None
    return (torch.zeros_like(positions.offsets) if own is None else own).float()


def _sum_of(gradients: list[Tensor], like: Tensor, share: Share, step: int) -> Tensor:
    """The sum of a step's gradients (out, in), one a batch, in the order of samples."""
    if share.counts[step] == [1]:
        return gradients[0]
    rows = torch.empty((len(gradients), like.numel()), device=like.device)
    for row, gradient in zip(rows, gradients, strict=True):
        row.copy_(gradient.flatten())
    return share.step_sum(rows, step).view_as(like)


def _gradient_of(states: Tensor) -> Tensor:
    assert states.grad is not None
    return states.grad
