"""Perplexity over fixed windows, streamed block by block."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lrquant.blocks import BlockInputs, BlockRunner, Head, Stream
from lrquant.model import Model

HEAD_TOKENS = 1024  # tokens whose logits are in memory at once
LARGEST_EXPONENT = 700.0


@dataclass(frozen=True)
class PreparedBlock:
    """A block ready to run: its runner (not yet entered) and the tensors it computes with."""

    runner: BlockRunner
    tensors: dict[str, Tensor]


@torch.no_grad()
def perplexity(
    model: Model,
    prepare: Callable[[int], PreparedBlock],
    windows: Tensor,
    stream: Stream,
    entry: BlockInputs,
    head_dtype: torch.dtype,
    progress: Callable[[int], None] = lambda block: None,
) -> float:
    """``exp`` of the mean negative log-likelihood of tokens 2..n of each window (windows, tokens).

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
    head = Head(model, stream.device, head_dtype)
    total = 0.0
    for index in range(len(windows)):
        total += _window_loss(head, stream.read(slice(index, index + 1)), windows[index])
    mean = total / (len(windows) * (windows.shape[1] - 1))
    return math.exp(mean) if mean < LARGEST_EXPONENT else math.inf


def _window_loss(head: Head, hidden_states: Tensor, tokens: Tensor) -> float:
    """Sum of the negative log-likelihoods of one window's tokens after the first."""
    total = 0.0
    targets = tokens[1:].to(hidden_states.device)
    for start in range(0, len(targets), HEAD_TOKENS):
        part = targets[start : start + HEAD_TOKENS]
        logits = head(hidden_states[:, start : start + len(part)])[0].float()
        total += float(torch.nn.functional.cross_entropy(logits, part, reduction="sum"))
    return total
