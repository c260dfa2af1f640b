"""Feeds: what a model's forward reads, sample by sample, and how samples form batches."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Inputs = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Feed:
    """Samples as keyword arguments of a model's forward.

    `inputs` has each sample as if alone: token ids (1, tokens), pixel values and what else a
    processor gives, first axes such that samples of the same shapes can be concatenated.
    `weights` (tokens,) float32 say how much each token counts in losses and statistics (None: all
    alike); `scored` (tokens,) bool which tokens are predicted where distributions are compared.
    """

    inputs: Sequence[Inputs]
    weights: Sequence[Tensor | None] = field(default=())
    scored: Sequence[Tensor | None] = field(default=())

    def __post_init__(self) -> None:
        for name in ("weights", "scored"):
            if not getattr(self, name):
                object.__setattr__(self, name, (None,) * len(self.inputs))

    @classmethod
    def of_tokens(cls, ids: Tensor) -> Feed:
        """Token ids (samples, tokens) int64."""
        return cls([{"input_ids": row[None]} for row in ids])

    def __len__(self) -> int:
        return len(self.inputs)

    def __add__(self, other: Feed) -> Feed:
        return Feed(
            [*self.inputs, *other.inputs],
            [*self.weights, *other.weights],
            [*self.scored, *other.scored],
        )

    def only(self, indices: Sequence[int]) -> Feed:
        """Some of the samples, in the given order."""
        return Feed(
            [self.inputs[i] for i in indices],
            [self.weights[i] for i in indices],
            [self.scored[i] for i in indices],
        )

    def with_pictures(self) -> Feed:
        """The samples that have more than tokens."""
        return self.only([i for i, sample in enumerate(self.inputs) if has_pictures(sample)])

    def grouped(self) -> Feed:
        """Samples of the same shapes side by side, else in the order that they had."""
        order = self.grouped_order()
        return self if order == list(range(len(self))) else self.only(order)

    def grouped_order(self) -> list[int]:
        """The indices of the samples in the order that `grouped` gives them."""
        indices: dict[object, list[int]] = {}
        for index, sample in enumerate(self.inputs):
            indices.setdefault(_signature(sample), []).append(index)
        return [index for alike in indices.values() for index in alike]

    def slices(self, batch_size: int) -> list[slice]:
        """Runs of at most `batch_size` samples of the same shapes."""
        batches: list[slice] = []
        for index, sample in enumerate(self.inputs):
            start = batches[-1].start if batches else 0
            alike = batches and _signature(self.inputs[start]) == _signature(sample)
            if alike and index - start < batch_size:
                batches[-1] = slice(start, index + 1)
            else:
                batches.append(slice(index, index + 1))
        return batches

    def collate(self, samples: slice) -> Inputs:
        """The arguments of one forward over some samples of the same shapes."""
        chosen = self.inputs[samples]
        return {name: torch.cat([sample[name] for sample in chosen]) for name in chosen[0]}

    def batch_weights(self, samples: slice) -> Tensor | None:
        """Weights (samples, tokens) of a batch, None if every token counts alike."""
        weights = self.weights[samples]
        if all(each is None for each in weights):
            return None
        tokens = self.inputs[samples.start]["input_ids"].shape[1]
        return torch.stack([torch.ones(tokens) if w is None else w for w in weights])

    def sha256(self) -> str:
        """Of every sample's names, shapes and little-endian bytes, and of given weights."""
        digest = hashlib.sha256()
        for sample in self.inputs:
            for name in sorted(sample):
                tensor = sample[name].contiguous()
                digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\n".encode())
                digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        for weights in self.weights:
            if weights is not None:
                digest.update(weights.numpy().data)
        return digest.hexdigest()


def has_pictures(sample: Inputs) -> bool:
    """Whether a sample has pixel values."""
    return any(name.startswith("pixel_values") for name in sample)


def _signature(sample: Inputs) -> tuple[tuple[str, torch.Size], ...]:
    """What must be the same for samples to be concatenated."""
    return tuple((name, sample[name].shape) for name in sorted(sample))
