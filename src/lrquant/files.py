"""Files that are whole or absent, whatever kills the process or fills the disk."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from lrquant.errors import LRQuantError, visible


def save_file(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """safetensors' own, readable to whom the umask says: its 0.8 leaves files to their owner."""
    safetensors.torch.save_file(tensors, path, metadata)
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that it is whole or absent."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        flush(temporary)
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def copy_whole(source: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    temporary = target.with_suffix(".tmp")
    shutil.copyfile(source, temporary)
    flush(temporary)
    temporary.replace(target)


def flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LRQuantError(f"{path}: cannot be read, or is not JSON") from error
    if not isinstance(values, dict):
        raise LRQuantError(f"{path}: not a JSON object")
    return values


class LogFile(logging.FileHandler):
    """A log whose disk may fill up: the run ends, or not, by what matters more than its log."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        with suppress(OSError):
            super().close()
