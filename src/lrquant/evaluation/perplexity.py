"""Scores over fixed windows, streamed block by block: perplexity, agreement with a reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lrquant.blocks import BlockInputs, BlockRunner, Head, Stream
from lrquant.model import Model

HEAD_TOKENS = 512  # tokens whose logits are in memory at once
LARGEST_EXPONENT = 700.0


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
    head: Head, stream: Stream, windows: Tensor, reference: Stream | None = None
) -> dict[str, float]:
    """Perplexity of windows (windows, tokens), and agreement with a reference's final states.

    perplexity: ``exp`` of the mean negative log-likelihood of tokens 2..n of each window.  Against
    the reference, over the same positions: `kl_mean` and `kl_p99`, the mean and 99th percentile of
    ``KL(reference || model)`` of the next-token distributions in nats, and `same_top`, the share of
    positions at which both prefer one token.
    """
    losses: list[Tensor] = []
    divergences: list[Tensor] = []
    same: list[Tensor] = []
    for index in range(len(windows)):
        window = slice(index, index + 1)
        targets = windows[index, 1:].to(stream.device)
        states = stream.read(window)
        compared = None if reference is None else reference.read(window)
        for start in range(0, len(targets), HEAD_TOKENS):
            part = slice(start, min(start + HEAD_TOKENS, len(targets)))
            logits = head(states[:, part])[0].float()
            losses.append(
                torch.nn.functional.cross_entropy(logits, targets[part], reduction="none").cpu()
            )
            if compared is None:
                continue
            expected = head(compared[:, part])[0].float()
            same.append((logits.argmax(-1) == expected.argmax(-1)).cpu())
            divergences.append(_divergence(expected, logits).cpu())
    mean = float(torch.cat(losses).double().mean())
    scores = {"perplexity": math.exp(mean) if mean < LARGEST_EXPONENT else math.inf}
    if reference is not None:
        divergence = torch.cat(divergences).double()
        scores["kl_mean"] = float(divergence.mean())
        scores["kl_p99"] = _percentile(divergence, 0.99)
        scores["same_top"] = float(torch.cat(same).double().mean())
    return scores


def _divergence(expected: Tensor, logits: Tensor) -> Tensor:
    """``KL(softmax(expected) || softmax(logits))`` of each row (tokens, vocabulary), in nats."""
    expected, logits = expected.log_softmax(-1), logits.log_softmax(-1)
    return torch.linalg.vecdot(expected.exp(), expected - logits)


def _percentile(values: Tensor, share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed."""
    rank = max(1, math.ceil(share * values.numel()))
    return float(values.kthvalue(rank).values)
