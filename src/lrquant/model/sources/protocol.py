"""The protocol of weight sources: what each answers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor


class WeightSource(Protocol):
    """A model's tensors by name; they may share memory, so they must not be edited in place."""

    origin: str

    def names(self) -> frozenset[str]:
        """Every name that `tensor` serves, extra names apart."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""

    def tensor(self, name: str) -> Tensor:
        """One tensor, read now, on the CPU in its stored dtype (GGUF: unpacked to float32)."""

    def read_ahead(self, names: Iterable[str]) -> None:
        """Have the system begin to read tensors that are needed soon, where it can."""
        return

    def alike(self, name: str, other: str) -> bool:
        """Whether two tensors are the same one, or hold the same values."""
        first, second = self.tensor(name), self.tensor(other)
        return first.dtype == second.dtype and torch.equal(first, second)

    def dtype(self, name: str) -> str:
        """In what `tensor` gives a tensor, as torch names it, without reading it."""

    def fingerprint(self) -> str:
        """SHA-256 that tells these weights from others; of files, only samples are read."""

    def unpacked_from(self) -> str:
        """In what the source stores weights that it quantised ("Q4_1 and Q8_0"); "" if in none."""
        return ""

    def extra_names(self) -> frozenset[str]:
        """Stored tensors the model has no place for; `tensor` reads them too."""
        return frozenset()
