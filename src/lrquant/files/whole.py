"""Files that are whole or absent, whatever kills the process or fills the disk."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import stat
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from lrquant.errors import LRQuantError, visible

_TEMPORARY = re.compile(r"\.lrquant-[0-9a-f]{32}\.tmp")
_CHUNK = 1 << 24
JsonObject = dict[str, Any]  # of values that only who knows the file can tell


def save_file(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """safetensors' own, readable to whom the umask says: its 0.8 leaves files to their owner."""
    safetensors.torch.save_file(tensors, path, metadata)
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def temporary_file(folder: Path) -> tuple[int, Path]:
    """A new file, open for writing, under a name that nobody else has or guesses."""
    path = folder / f".lrquant-{secrets.token_hex(16)}.tmp"
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666), path


def remove_temporaries(folder: Path) -> None:
    """Remove what kills left of `temporary_file`; only for who holds the folder's lock."""
    for name in os.listdir(folder) if folder.is_dir() else []:
        if _TEMPORARY.fullmatch(name):
            (folder / name).unlink(missing_ok=True)


def write_whole(
    path: Path, content: str | bytes, before_rename: Callable[[], None] = lambda: None
) -> None:
    """Write a file so that it is whole or absent, and on the disk when this returns."""
    handle, temporary = temporary_file(path.parent)
    try:
        with open(handle, "wb") as file:
            file.write(as_bytes(content))
            file.flush()
            os.fsync(handle)
        before_rename()
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    flush(path.parent)


def as_bytes(content: str | bytes) -> bytes:
    """Text as UTF-8; what is no text, such as half of a pair of surrogates, spelled out."""
    return content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content


def flush(path: Path) -> None:
    """Wait until a file, or a folder's entries, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_plain(path: Path) -> bytes:
    """A regular file's content; OSError for all else, without waiting for a pipe's writer."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(0, "not a regular file", str(path))
        with open(handle, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(handle)


def is_regular(path: Path) -> bool:
    """Whether a path is a file itself, no link to one."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def sha256_of(path: Path) -> str:
    """The hash of a file of any size."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def read_json(path: Path) -> JsonObject:
    """A file that holds one JSON object."""
    try:
        return json_object(read_plain(path))
    except OSError as error:
        raise LRQuantError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise LRQuantError(f"{path}: not a JSON object") from error


def json_object(content: str | bytes) -> JsonObject:
    """The JSON object that `content` is; ValueError for all else."""
    try:
        values = json.loads(content)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(values, dict):
        raise ValueError("not an object")
    return values


def json_or_empty(path: Path) -> JsonObject:
    """The JSON object in a file, an empty one where there is none: others say what is wrong."""
    try:
        return json_object(read_plain(path))
    except (OSError, ValueError):
        return {}


def require_writable(path: Path, flag: str) -> None:
    """Refuse a place, named by `flag`, in which no file can be made."""
    place = nearest_existing(path)
    if not place.is_dir():
        raise LRQuantError(f"{flag} {path}: {place} is a file; use another folder")
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise LRQuantError(
            f"{flag} {path}: {place} cannot be written ({error.strerror}); use another folder"
        ) from error


def nearest_existing(path: Path) -> Path:
    """The path, or the nearest of its parents that exists."""
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return path


class LogFile(logging.FileHandler):
    """A log whose disk may fill up: the run ends, or not, by what matters more than its log.

    A link in its place is not followed, and a pipe's reader not waited for: OSError.
    """

    def _open(self) -> TextIOWrapper:
        def opener(path: str, flags: int) -> int:
            return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)

        file = open(  # noqa: SIM115 the handler closes it
            *(self.baseFilename, self.mode, -1, self.encoding, self.errors), opener=opener
        )
        assert isinstance(file, TextIOWrapper)
        return file

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        with suppress(OSError):
            super().close()
