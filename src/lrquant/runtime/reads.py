"""What linears made of the tensor that they read last, for the next one that reads the same.

Q, K and V read one tensor, and so do gate and up: the matrix is multiplied, and the codes are made,
once for them.  One result is kept, and only as long as the tensor that it is of.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor

Made = tuple[Tensor, ...]


class _Entry(NamedTuple):
    values: weakref.ref[Tensor]
    version: int | None
    how: Hashable
    made: Made


class LastRead:
    """The last result.  Threads may replace each other's, and never take a wrong one."""

    def __init__(self) -> None:
        self._entry: _Entry | None = None

    def of(self, values: Tensor, how: Hashable, make: Callable[[Tensor], Made]) -> Made:
        """What `make` makes of values, which `how` says all of; as it was made, if it just was.

        Nothing is kept while gradients are recorded, or by torch.compile, which joins what is the
        same in its graph by itself.
        """
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return make(values)
        version = None if values.is_inference() else values._version
        entry = self._entry
        if entry is not None and entry.values() is values and entry[1:3] == (version, how):
            return entry.made
        made = make(values)
        self._entry = _Entry(weakref.ref(values, self._forget), version, how, made)
        return made

    def _forget(self, values: weakref.ref[Tensor]) -> None:
        entry = self._entry
        if entry is not None and entry.values is values:
            self._entry = None


LAST_READ = LastRead()
