"""Scores over fixed windows, streamed block by block: perplexity, agreement with a reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lrquant.blocks.inputs import BlockInputs
from lrquant.blocks.runner import Variant
from lrquant.blocks.streams import Batch, Stream, batches_of
from lrquant.data.feeds import Feed
from lrquant.measures.agreement import agreement, perplexity
from lrquant.model.model import Model

HEAD_TOKENS = 512  # tokens whose logits are in memory at once


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
                output = runner(prepared.tensors, states, entry.arguments(number, index))
                stream.write(batch, output)
        progress(index)


@torch.no_grad()
def score(
    head: Callable[[Tensor], Tensor],
    stream: Stream,
    feed: Feed | Tensor,
    reference: Stream | None = None,
    reference_head: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Any]:
    """Perplexity of samples, or windows (windows, tokens), and agreement with a reference.

    perplexity: ``exp`` of the mean negative log-likelihood of the `scored` tokens of each sample,
    its first one apart.  The agreement over the same positions is that of `agreement` with the
    reference's final states; the reference has the same head unless another one is given.
    """
    feed = Feed.of_tokens(feed) if isinstance(feed, Tensor) else feed
    scores: list[list[Tensor]] = []
    lengths: list[int] = []
    for batch, ids, scored in single_samples(feed):
        states = stream.read(batch)[:, :-1][:, scored]
        compared = None if reference is None else reference.read(batch)[:, :-1][:, scored]
        targets = ids[1:][scored].to(stream.device)
        lengths.append(len(targets))
        for start in range(0, len(targets), HEAD_TOKENS):
            part = slice(start, start + HEAD_TOKENS)
            logits = head(states[:, part])[0].float()
            found = [_losses(logits, targets[part])]
            if compared is not None:
                expected = (reference_head or head)(compared[:, part])[0].float()
                found += [_losses(expected, targets[part]), _divergence(expected, logits)]
                found.append(logits.argmax(-1) == expected.argmax(-1))
            scores.append([values.double().cpu() for values in found])
    joined = [torch.cat(values) for values in zip(*scores, strict=True)]
    if len(set(lengths)) == 1 and not any(scored is not None for scored in feed.scored):
        joined = [values.view(len(lengths), -1) for values in joined]
    return {"perplexity": perplexity(joined[0])} | (agreement(*joined) if joined[1:] else {})


def single_samples(feed: Feed) -> Iterator[tuple[Batch, Tensor, Tensor]]:
    """Each sample's rows of a stream, its ids (tokens,), and which of tokens 2..n are scored."""
    ids = [sample["input_ids"][0] for sample in feed.inputs]
    batches = batches_of(feed.slices(1), [(1, len(row)) for row in ids])
    for batch, row, chosen in zip(batches, ids, feed.scored, strict=True):
        every = torch.ones_like(row, dtype=torch.bool)
        yield batch, row, (every if chosen is None else chosen)[1:]


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def _divergence(expected: Tensor, logits: Tensor) -> Tensor:
    """``KL(softmax(expected) || softmax(logits))`` of each row (tokens, vocabulary), in nats."""
    expected, logits = expected.log_softmax(-1), logits.log_softmax(-1)
    return torch.linalg.vecdot(expected.exp(), expected - logits)
