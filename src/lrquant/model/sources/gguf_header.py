"""The header of a GGUF file: that it says no more than the file can hold.

What reads it trusts its counts and lengths: a flipped bit there costs hours or all memory.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import BinaryIO

import gguf

from lrquant.model.sources.checks import damaged

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_ENTRY, _TENSOR = 13, 24  # fewest bytes of a key with its value, and of a tensor's line
_MOST_AXES, _DEEPEST = 4, 3
_ALIGNMENT = b"general.alignment"


def require_sound_header(path: Path) -> None:
    """Refuse a header with a count, length, type or offset that the file has no room for."""
    try:
        with path.open("rb") as file:
            _Walk(file, path.stat().st_size).header()
    except (OSError, ValueError, struct.error) as error:
        raise damaged(path, error) from error


class _Walk:
    """Steps over a header, each no further than the file goes."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size
        self._alignment = 32

    def header(self) -> None:
        if self._file.read(4) != _MAGIC:
            raise ValueError("not a GGUF file")
        (version,) = self._take("<I")
        if version not in _VERSIONS:
            raise ValueError(f"GGUF version {version}, or made for another byte order")
        tensors, entries = self._take("<QQ")
        self._require(tensors * _TENSOR + entries * _ENTRY)
        for _ in range(entries):
            self._entry()
        extents = [self._tensor() for _ in range(tensors)]
        start = -(-self._file.tell() // self._alignment) * self._alignment
        beyond = [offset for offset, length in extents if start + offset + length > self._size]
        if beyond:
            raise ValueError(f"{len(beyond)} of {tensors} tensors lie beyond the file's end")

    def _entry(self) -> None:
        key = self._string()
        (kind,) = self._take("<I")
        if key != _ALIGNMENT or kind != 4:
            return self._skip_value(kind, 0)
        (self._alignment,) = self._take("<I")
        if self._alignment.bit_count() != 1:
            raise ValueError(f"an alignment of {self._alignment} bytes")

    def _skip_value(self, kind: int, depth: int) -> None:
        if kind in _WIDTHS:
            self._skip(_WIDTHS[kind])
        elif kind == _STRING:
            self._string()
        elif kind == _ARRAY and depth < _DEEPEST:
            inner, count = self._take("<IQ")
            if inner in _WIDTHS:
                self._skip(count * _WIDTHS[inner])
                return
            self._require(8 * count)
            for _ in range(count):
                self._skip_value(inner, depth + 1)
        else:
            raise ValueError(f"a value of type {kind}")

    def _tensor(self) -> tuple[int, int]:
        """Where a tensor begins, from the end of the header, and how many bytes it has."""
        self._string()
        (axes,) = self._take("<I")
        if axes > _MOST_AXES:
            raise ValueError(f"a tensor of {axes} axes")
        shape = self._take(f"<{axes}Q")
        kind, offset = self._take("<IQ")
        block, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        return offset, math.prod(shape) // block * width

    def _string(self) -> bytes:
        (length,) = self._take("<Q")
        self._require(length)
        return self._file.read(length)

    def _take(self, form: str) -> tuple[int, ...]:
        return struct.unpack(form, self._file.read(struct.calcsize(form)))

    def _skip(self, length: int) -> None:
        self._require(length)
        self._file.seek(length, 1)

    def _require(self, length: int) -> None:
        if length > self._size - self._file.tell():
            raise ValueError(f"{length} bytes announced that the file does not have")
