"""Scores over fixed windows, streamed block by block: perplexity, agreement with a reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrquant.blocks import BlockInputs, BlockRunner, Stream
from lrquant.evaluation.agreement import agreement, perplexity
from lrquant.model import Model

HEAD_TOKENS = 512  # tokens whose logits are in memory at once


@dataclass(frozen=True)
class PreparedBlock:
    """A block ready to run: its runner (not yet entered) and the tensors it computes with."""

    runner: BlockRunner
    tensors: dict[str, Tensor]


@torch.no_grad()
def send_through(
    model: Model,
    prepare: Callable[[int], PreparedBlock],
    stream: Stream,
    entry: BlockInputs,
    progress: Callable[[int], None] = lambda block: None,
) -> None:
    """Fill `stream` with the hidden states after the last block.

    `prepare` gives block i when it is needed; one block is in memory at a time.
    """
    entry.embed(stream)
    for index in range(len(model.blocks)):
        prepared = prepare(index)
        with prepared.runner as runner:
            for batch, samples in enumerate(entry.batches):
                output = runner(
                    prepared.tensors, stream.read(samples), entry.arguments(batch, index)
                )
                stream.write(samples, output)
        progress(index)


@torch.no_grad()
def score(
    head: Callable[[Tensor], Tensor],
    stream: Stream,
    windows: Tensor,
    reference: Stream | None = None,
    reference_head: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Any]:
    """Perplexity of windows (windows, tokens), and agreement with a reference's final states.

    perplexity: ``exp`` of the mean negative log-likelihood of tokens 2..n of each window.  The
    agreement over the same positions is that of `agreement`; the reference has the same head unless
    another one is given.
    """
    scores: list[list[Tensor]] = []
    for index in range(len(windows)):
        window = slice(index, index + 1)
        targets = windows[index, 1:].to(stream.device)
        states = stream.read(window)
        compared = None if reference is None else reference.read(window)
        for start in range(0, len(targets), HEAD_TOKENS):
            part = slice(start, min(start + HEAD_TOKENS, len(targets)))
            logits = head(states[:, part])[0].float()
            found = [_losses(logits, targets[part])]
            if compared is not None:
                expected = (reference_head or head)(compared[:, part])[0].float()
                found += [_losses(expected, targets[part]), _divergence(expected, logits)]
                found.append(logits.argmax(-1) == expected.argmax(-1))
            scores.append([values.double().cpu() for values in found])
    shape = (len(windows), windows.shape[1] - 1)
    joined = [torch.cat(values).view(shape) for values in zip(*scores, strict=True)]
    return {"perplexity": perplexity(joined[0])} | (agreement(*joined) if joined[1:] else {})


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def _divergence(expected: Tensor, logits: Tensor) -> Tensor:
    """``KL(softmax(expected) || softmax(logits))`` of each row (tokens, vocabulary), in nats."""
    expected, logits = expected.log_softmax(-1), logits.log_softmax(-1)
    return torch.linalg.vecdot(expected.exp(), expected - logits)
