"""Predictions over fixed windows, streamed block by block, and beside them those of a reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from lrquant.blocks.head import HEAD_TOKENS
from lrquant.blocks.inputs import BlockInputs
from lrquant.blocks.runner import Variant
from lrquant.blocks.streams import Batch, Stream, batches_of
from lrquant.data.feeds import Feed
from lrquant.model.model import Model
from lrquant.numerics.losses import kl_divergence
from lrquant.team.team import ALONE, Team

R = TypeVar("R", covariant=True)
LogitsOf = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Predictions:
    """Logits (tokens, vocabulary) float32 of some positions, and the tokens (tokens,) that follow.

    `expected` are the reference's logits at the same positions, None where nothing is held against
    one.
    """

    logits: Tensor
    targets: Tensor
    expected: Tensor | None = None

    @cached_property
    def losses(self) -> Tensor:
        """Negative log-likelihood of each token that follows, in nats."""
        return _losses(self.logits, self.targets)

    @property
    def reference(self) -> Tensor:
        """The reference's logits, where there is one."""
        assert self.expected is not None
        return self.expected

    @cached_property
    def expected_losses(self) -> Tensor:
        """The reference's."""
        return _losses(self.reference, self.targets)

    @cached_property
    def divergences(self) -> Tensor:
        """``KL(reference || model)`` at each position, in nats."""
        return kl_divergence(self.logits, self.reference)

    @cached_property
    def same_top(self) -> Tensor:
        """Whether both prefer one token."""
        return self.logits.argmax(-1) == self.reference.argmax(-1)


class OfPositions(Protocol[R]):
    """What scores predictions position by position, and sums all of them up."""

    def positions(self, predictions: Predictions) -> Sequence[Tensor]: ...

    def summary(self, values: Sequence[Tensor]) -> R: ...


@torch.no_grad()
def send_through(
    model: Model,
    variant: Variant,
    stream: Stream,
    entry: BlockInputs,
    progress: Callable[[int], None] = lambda block: None,
) -> None:
    """Fill `stream` with the hidden states after the last block.

    `variant` gives each block when it is needed: one of the language part is in memory at a time.
    """
    entry.embed(stream, variant.tower)
    for index in range(len(model.blocks)):
        prepared = variant(index)
        with prepared.runner as runner:
            for number, batch in enumerate(entry.batches):
                states = stream.read(batch, index)
                handed = stream.handed_on(batch)
                arguments = entry.arguments(number, index, handed)
                output = runner(prepared.tensors, states, arguments)
                stream.hand_on(batch, handed, stream)
                stream.write(batch, output)
        progress(index)


@torch.no_grad()
def score(
    measures: Sequence[OfPositions[R]],
    head: LogitsOf,
    stream: Stream,
    feed: Feed,
    reference: Stream | None = None,
    reference_head: LogitsOf | None = None,
    at_once: int = HEAD_TOKENS,
    team: Team = ALONE,
) -> list[R]:
    """Scores of each measure over the `scored` tokens of each sample, its first one apart.

    `stream` has the final hidden states, `reference` those of what they are held against; it has
    the same head unless another one is given.  Heads make logits of so many tokens `at_once`.  Of a
    `team` each member has some of the samples, the first member the first ones.
    """
    values: list[list[list[Tensor]]] = [[] for _ in measures]
    lengths: list[int] = []
    for batch, ids, scored in single_samples(feed):
        states = stream.read(batch)[:, :-1][:, scored]
        compared = None if reference is None else reference.read(batch)[:, :-1][:, scored]
        targets = ids[1:][scored].to(stream.device)
        lengths.append(len(targets))
        for start in range(0, len(targets), at_once):
            tokens = slice(start, start + at_once)
            expected = None
            logits = head(states[:, tokens])[0].float()
            if compared is not None:
                expected = (reference_head or head)(compared[:, tokens])[0].float()
            predictions = Predictions(logits, targets[tokens], expected)
            for measure, collected in zip(measures, values, strict=True):
                collected.append([each.double().cpu() for each in measure.positions(predictions)])
    members = team.each((values, lengths, any(scored is not None for scored in feed.scored)))
    lengths = [length for _, own, _ in members for length in own]
    whole = len(set(lengths)) == 1 and not any(partly for *_, partly in members)
    return [
        measure.summary(
            _joined(
                [pieces for own, *_ in members for pieces in own[place]],
                len(lengths) if whole else None,
            )
        )
        for place, measure in enumerate(measures)
    ]


def _joined(pieces: list[list[Tensor]], windows: int | None) -> list[Tensor]:
    """Values of all positions, (windows, positions) where all windows are whole."""
    joined = [torch.cat(values) for values in zip(*pieces, strict=True)]
    return joined if windows is None else [values.view(windows, -1) for values in joined]


def single_samples(feed: Feed) -> Iterator[tuple[Batch, Tensor, Tensor]]:
    """Each sample's rows of a stream, its ids (tokens,), and which of tokens 2..n are scored."""
    ids = [sample["input_ids"][0] for sample in feed.inputs]
    batches = batches_of(feed.slices(1), [(1, len(row)) for row in ids])
    for batch, row, chosen in zip(batches, ids, feed.scored, strict=True):
        every = torch.ones_like(row, dtype=torch.bool)
        yield batch, row, (every if chosen is None else chosen)[1:]


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")
