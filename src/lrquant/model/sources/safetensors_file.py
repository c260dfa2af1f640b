"""One safetensors file, its tensors copied out of it.

A mapped file that somebody cuts short kills the process without a word (SIGBUS); reading says so.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import _TYPES
from torch import Tensor

from lrquant.errors import LRQuantError
from lrquant.model.sources.checks import damaged

_LENGTH = 8  # bytes that say how long the header is


class SafetensorsFile:
    """Its header is checked at opening, by the library itself, against the file's size."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = path.open("rb")
            with safe_open(path, framework="pt", device="cpu"):
                self._state = self._stat()
            length = int.from_bytes(self._file.read(_LENGTH), "little")
            self._entries: dict[str, dict[str, Any]] = json.loads(self._file.read(length))
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
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
        return str(_TYPES.get(stored, stored)).removeprefix("torch.")

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

    def _read(self, content: memoryview, offset: int) -> None:
        while content:
            count = os.preadv(self._file.fileno(), [content], offset)
            if not count:
                break
            content, offset = content[count:], offset + count
        if content or self._stat() != self._state:
            raise LRQuantError(
                f"{self._path}: changed while it was read; leave the model alone and start again"
            )

    def _stat(self) -> tuple[int, int]:
        found = os.fstat(self._file.fileno())
        return found.st_size, found.st_mtime_ns
