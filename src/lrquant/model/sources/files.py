"""Weights files in a folder, safetensors or of torch.save, whole or in shards."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from lrquant.errors import UNREADABLE, LRQuantError
from lrquant.model.sources.checks import (
    AGAIN,
    damaged,
    file_state,
    fingerprint_of,
    is_listed,
    require_unchanged,
    sound_file,
    unfinished_download,
)
from lrquant.model.sources.memory import HeldTensors
from lrquant.model.sources.protocol import WeightSource
from lrquant.model.sources.safetensors_file import SafetensorsFile

SAFETENSORS = "model.safetensors"
TORCH = "pytorch_model.bin"
INDEX = ".index.json"
Entry = TypeVar("Entry")


class SafetensorsSource(WeightSource):
    """`model.safetensors`, or the shards of its index."""

    def __init__(self, folder: Path) -> None:
        self.origin = str(folder)
        self._files = _weight_files(folder, SAFETENSORS)
        self._handles: dict[str, SafetensorsFile] = {}
        for path, promised in self._files.items():
            handle = SafetensorsFile(path)
            _add_shard(self._handles, dict.fromkeys(handle.keys(), handle), promised, path)

    def names(self) -> frozenset[str]:
        return frozenset(self._handles)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._handles[name].shape(name)

    def dtype(self, name: str) -> str:
        return self._handles[name].dtype(name)

    def tensor(self, name: str) -> Tensor:
        return self._handles[name].tensor(name)

    def read_ahead(self, names: Iterable[str]) -> None:
        for name in names:
            self._handles[name].read_ahead(name)

    def fingerprint(self) -> str:
        return fingerprint_of(self._files)


class TorchFileSource(HeldTensors):
    """`pytorch_model.bin`, or the shards of its index; memory-mapped if of torch 1.6 or later."""

    def __init__(self, folder: Path) -> None:
        self.origin = str(folder)
        self._files = _weight_files(folder, TORCH)
        self._tensors = {}
        self._states = {path: file_state(path) for path in self._files}
        for path, promised in self._files.items():
            _add_shard(self._tensors, _load_torch(path), promised, path)

    def tensor(self, name: str) -> Tensor:
        for path, state in self._states.items():  # it is mapped: cut short, it kills the process
            require_unchanged(path, state)
        return self._tensors[name].detach()

    def fingerprint(self) -> str:
        return fingerprint_of(self._files)


def _weight_files(folder: Path, single: str) -> dict[Path, set[str]]:
    """The weights files, each with the tensors its index promises."""
    if is_listed(folder / single):
        return {sound_file(folder / single): set()}
    index = sound_file(folder / f"{single}{INDEX}")
    promised: dict[Path, set[str]] = {}
    try:
        for name, file in json.loads(index.read_bytes())["weight_map"].items():
            if Path(file).name != file:
                raise ValueError(f"shard {file!r} is not a plain file name")
            promised.setdefault(folder / file, set()).add(name)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(index, error) from error
    missing = sorted(path.name for path in promised if not path.is_file())
    if missing or not promised:
        raise LRQuantError(
            f"{folder}: {len(missing)} of {len(promised)} weight shards are missing "
            f"(first: {missing[0] if missing else None}){unfinished_download(folder)}; {AGAIN}"
        )
    return {sound_file(path): names for path, names in promised.items()}


def _add_shard(
    entries: dict[str, Entry], shard: Mapping[str, Entry], promised: set[str], path: Path
) -> None:
    """Add a shard's entries; where two shards hold a name, the index decides."""
    lacking = sorted(promised - shard.keys())
    if lacking:
        raise LRQuantError(
            f"{path}: lacks {len(lacking)} of the {len(promised)} tensors that the index promises "
            f"(first: {lacking[0]}); {AGAIN}"
        )
    new = {name: shard[name] for name in shard if name in promised or name not in entries}
    entries.update(new)


def _load_torch(path: Path) -> dict[str, Tensor]:
    try:
        # Only the zip format (torch 1.6 and later) can be mapped.
        loaded = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except pickle.UnpicklingError as error:
        raise LRQuantError(
            f"{path}: damaged, or holds more than tensors and could run code, so it is not loaded; "
            f"{AGAIN}, as safetensors if there is a choice"
        ) from error
    except UNREADABLE as error:
        raise damaged(path, error) from error
    if not isinstance(loaded, dict) or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise LRQuantError(
            f"{path}: not a plain dictionary of tensors; save the model's state_dict() alone"
        )
    return loaded
