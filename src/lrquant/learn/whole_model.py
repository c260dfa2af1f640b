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

from lrquant.blocks.handed import HandedOn, leaves, moved, owe_
from lrquant.blocks.head import Head
from lrquant.blocks.inputs import BlockInputs
from lrquant.blocks.streams import Stream
from lrquant.blocks.tuned import TunedBlock
from lrquant.errors import LRQuantError
from lrquant.files.whole import JsonObject
from lrquant.ingredients.tuning import Tuning
from lrquant.learn.gradients import Gradients, PositionGradients
from lrquant.learn.share import Share
from lrquant.numerics.losses import kl_divergence
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
    """A batch on its way through all blocks, where these live.

    Of each block that it has gone through, and of the one that comes next, there is what enters it
    (`inputs`) and what those before left it (`handed`).  `gradient` is that of the loss to what
    left the block that is stepped next, `owed` those to what blocks left for later ones.
    """

    batch: int
    inputs: list[Tensor]
    handed: list[HandedOn] = field(default_factory=lambda: [HandedOn({})])
    gradient: Tensor = field(init=False)
    owed: dict[str, list[Tensor]] = field(default_factory=dict)

    def forget(self) -> None:
        """Let go of all but what enters the block that comes next."""
        del self.inputs[:-1], self.handed[:-1]


@dataclass
class WholeFit:
    """Epochs over the whole model.

    Blocks may live elsewhere than they compute: each is on the device once for all batches that go
    through it together, and what enters it is where it lives.
    """

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

    @property
    def _device(self) -> torch.device:
        return self.learned.first.device

    @property
    def _home(self) -> torch.device:
        return self.blocks[0].device

    def _keep(self) -> None:
        self.best = [self._kept(block.on(self._device)) for block in self.blocks]

    def _kept(self, block: TunedBlock) -> dict[str, Tensor]:
        kept = self.tuning.kept(block.parameters).items()
        return {name: each.detach().to(self._home, copy=True) for name, each in kept}

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
        samples, losses = self.learned, {}
        passed = self._through(samples, samples.share.steps[step], kept=True)
        for each in passed:
            weight = samples.share.weights[each.batch]
            each.handed.pop()
            loss, gradient = self._of_logits(each.inputs.pop(), samples, each.batch)
            losses[each.batch] = loss * weight
            each.gradient = (gradient * weight).to(self._home)
        for index in reversed(range(len(self.blocks))):
            self._step_block(index, passed, step)
        return losses

    def _step_block(self, index: int, passed: list[_Passed], step: int) -> None:
        """Step a block by the gradients of all batches that have come back to it."""
        share, block = self.learned.share, self.blocks[index].on(self._device)
        factors = Gradients(list(block.factors.values()))
        positions = PositionGradients(block.positions.values(), share.team.size == 1)
        for each in passed:
            self._back(block, index, each)
            factors.take_in()
            positions.take_in()
        factors.put_back(share, step)
        positions.put_back(share, step)
        block.step()
        self.blocks[index].take(block)

    def _back(self, block: TunedBlock, index: int, passed: _Passed) -> None:
        """Compute a block once more, and take the gradient through it."""
        device = self._device
        states = passed.inputs.pop().to(device).requires_grad_(True)
        read = leaves(moved(passed.handed.pop(), device))
        arguments = self.learned.entry.arguments(passed.batch, index, read)
        with torch.enable_grad():
            output = block(states, arguments)
        owed = passed.owed
        left = [(each, owed.pop(name)) for name, each in read.new.items() if name in owed]
        outputs = [output, *(tensor for tensors, _ in left for tensor in tensors)]
        gradient = passed.gradient.to(device)
        torch.autograd.backward(outputs, [gradient, *(g for _, each in left for g in each)])
        passed.gradient = _gradient_of(states).to(self._home)
        owe_(owed, read)

    @torch.no_grad()
    def _through(
        self, samples: TunedSamples, batches: Sequence[int], *, kept: bool
    ) -> list[_Passed]:
        """Batches behind all blocks, with what entered each if that is to be `kept`."""
        passed = []
        for batch in batches:
            states = samples.first.read(samples.entry.batches[batch])
            passed.append(_Passed(batch, [states.to(self._home)]))
        for index in range(len(self.blocks)):
            self._through_block(index, samples, passed)
            for each in passed:
                if not kept:
                    each.forget()
        return passed

    def _through_block(self, index: int, samples: TunedSamples, passed: list[_Passed]) -> None:
        """Send batches through one block, which then leaves the device."""
        block = self.blocks[index].on(self._device)
        for each in passed:
            self._forward(block, index, samples, each)

    def _forward(
        self, block: TunedBlock, index: int, samples: TunedSamples, passed: _Passed
    ) -> None:
        """Send a batch through one block."""
        device, home = self._device, self._home
        states = passed.inputs[-1].to(device)
        added = samples.first.added_before(samples.entry.batches[passed.batch], index)
        if added is not None:
            states = states + added
            passed.inputs[-1] = states.to(home)
        before = passed.handed[-1]
        handed = HandedOn(moved(before, device))
        output = block(states, samples.entry.arguments(passed.batch, index, handed))
        passed.inputs.append(output.to(home))
        passed.handed.append(HandedOn({**before, **moved(handed.new, home)}))

    def _of_logits(self, states: Tensor, samples: TunedSamples, batch: int) -> tuple[float, Tensor]:
        """The divergence of a batch, mean over its tokens, and its gradient to the last states."""
        states = states.to(self._device)
        target = samples.target.read(samples.entry.batches[batch])
        weights = samples.entry.weights(batch)
        if weights is None:
            weights = torch.ones(states.shape[:-1], device=states.device)
        weights = weights / weights.sum()
        gradient, total = torch.empty_like(states), 0.0
        at_once = states.shape[1] if self.classifies else max(1, self.head.at_once // len(states))
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
        batches, losses = range(len(samples.entry.batches)), []
        together = max(map(len, self.learned.share.steps))  # as many states as a step has, or less
        for start in range(0, len(batches), together):
            for each in self._through(samples, batches[start : start + together], kept=False):
                losses.append(self._of_logits(each.inputs.pop(), samples, each.batch)[0])
        every = samples.share.in_order(losses)
        return sum(every) / len(every)


def _gradient_of(states: Tensor) -> Tensor:
    assert states.grad is not None
    return states.grad
