"""One safetensors file, its tensors copied out of it.

A mapped file that somebody cuts short kills the process without a word (SIGBUS); reading says so.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypedDict

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import _TYPES
from torch import Tensor

from lrquant.errors import LRQuantError
from lrquant.files.whole import json_object
from lrquant.model.device import dtype_name
from lrquant.model.sources.checks import changed, damaged, state_of

_LENGTH = 8  # bytes that say how long the header is


class _Entry(TypedDict):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class SafetensorsFile:
    """Its header is checked at opening, by the library itself, against the file's size."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = path.open("rb")
            with safe_open(path, framework="pt", device="cpu"):
                self._state = self._stat()
            length = int.from_bytes(self._file.read(_LENGTH), "little")
            self._entries: dict[str, _Entry] = json_object(self._file.read(length))
        except (SafetensorError, OSError, ValueError) as error:
            raise damaged(path, error) from error
        self._entries.pop("__metadata__", None)
        self._start = _LENGTH + length

    def keys(self) -> list[str]:
        """Names of the tensors."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self._entries[name]["shape"])

    def dtype(self, name: str) -> str:
        """A tensor's dtype as torch names it, or as the file does where torch has none."""
        stored = self._entries[name]["dtype"]
        dtype = _TYPES.get(stored)
        return stored if dtype is None else dtype_name(dtype)

    def tensor(self, name: str) -> Tensor:
        """One tensor, read now."""
        entry = self._entries[name]
        dtype = _TYPES.get(entry["dtype"])
        if dtype is None:
            raise LRQuantError(f"{self._path}: {name} is of dtype {entry['dtype']}, unknown here")
        start, end = entry["data_offsets"]
        content = torch.empty(end - start, dtype=torch.uint8)
        self._read(content.numpy().data, self._start + start)
        return content.view(dtype).reshape(entry["shape"])

    def read_ahead(self, name: str) -> None:
        """Have the system read one tensor into its cache; nothing waits for it."""
        if hasattr(os, "posix_fadvise"):
            start, end = self._entries[name]["data_offsets"]
            place = self._file.fileno(), self._start + start, end - start
            os.posix_fadvise(*place, os.POSIX_FADV_WILLNEED)

    def _read(self, content: memoryview, offset: int) -> None:
        while content:
            count = os.preadv(self._file.fileno(), [content], offset)
            if not count:
                break
            content, offset = content[count:], offset + count
        if content or self._stat() != self._state:
            raise changed(self._path)

    def _stat(self) -> tuple[int, int]:
        return state_of(os.fstat(self._file.fileno()))
