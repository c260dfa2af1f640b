"""Weights of experts in MXFP4, as gpt-oss is published, unpacked by transformers' own function.

`NAME_blocks` (experts, out, groups, 16), two values a byte, and `NAME_scales` (experts, out,
groups), powers of 2, are `NAME` (experts, in, out) in bfloat16, which holds them exactly.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

import torch
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from lrquant.errors import LRQuantError
from lrquant.model.sources.checks import AGAIN
from lrquant.model.sources.protocol import WeightSource

_BLOCKS, _SCALES = "_blocks", "_scales"
_VALUES = 2  # in a byte


class MXFP4Source(WeightSource):
    """What another source stores, with pairs of blocks and scales under their weight's name."""

    def __init__(self, stored: WeightSource) -> None:
        self.origin, self._stored = stored.origin, stored
        names = stored.names()
        weights = (name.removesuffix(_BLOCKS) for name in names if name.endswith(_BLOCKS))
        self._packed = frozenset(name for name in weights if f"{name}{_SCALES}" in names)
        for name in sorted(self._packed):
            self._require_pair(name)

    def _require_pair(self, name: str) -> None:
        blocks, scales = (self._stored.shape(f"{name}{each}") for each in (_BLOCKS, _SCALES))
        kinds = {self._stored.dtype(f"{name}{each}") for each in (_BLOCKS, _SCALES)}
        if len(blocks) != 4 or blocks[:-1] != scales or kinds != {"uint8"}:
            raise LRQuantError(
                f"{self.origin}: {name}: blocks {list(blocks)} and scales {list(scales)} of "
                f"{' and '.join(sorted(kinds))} are no MXFP4 weight of experts; {AGAIN}"
            )

    def names(self) -> frozenset[str]:
        pairs = {f"{name}{each}" for name in self._packed for each in (_BLOCKS, _SCALES)}
        return self._stored.names() - pairs | self._packed

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._packed:
            return self._stored.shape(name)
        experts, rows, groups, size = self._stored.shape(f"{name}{_BLOCKS}")
        return experts, groups * size * _VALUES, rows

    def dtype(self, name: str) -> str:
        return "bfloat16" if name in self._packed else self._stored.dtype(name)

    def tensor(self, name: str) -> Tensor:
        if name not in self._packed:
            return self._stored.tensor(name)
        blocks, scales = (self._stored.tensor(f"{name}{each}") for each in (_BLOCKS, _SCALES))
        weight = torch.empty(self.shape(name), dtype=torch.bfloat16)
        for expert, own in enumerate(weight):  # all at once would take several times as much
            packed = slice(expert, expert + 1)
            own.copy_(convert_moe_packed_tensors(blocks[packed], scales[packed])[0])
        return weight

    def read_ahead(self, names: Iterable[str]) -> None:
        pairs = ([f"{n}{_BLOCKS}", f"{n}{_SCALES}"] if n in self._packed else [n] for n in names)
        self._stored.read_ahead(chain.from_iterable(pairs))

    def unpacked_from(self) -> str:
        return "MXFP4" if self._packed else self._stored.unpacked_from()

    def fingerprint(self) -> str:
        return self._stored.fingerprint()
