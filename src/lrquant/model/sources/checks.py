"""Checks of a weights file: that it is whole and does not change, and which one it is."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from lrquant.errors import LRQuantError

AGAIN = "download it again"
_LFS_POINTER = b"version https://git-lfs"
_MIB = 2**20


def is_listed(path: Path) -> bool:
    """Whether a folder lists the file, be it a link to nothing or something else by its name."""
    return path.exists() or path.is_symlink()


def sound_file(path: Path) -> Path:
    """The path, if it is a file with content."""
    if path.is_symlink() and not path.exists():
        raise LRQuantError(f"{path}: a link to nothing{unfinished_download(path.parent)}; {AGAIN}")
    if path.exists() and not path.is_file():
        raise LRQuantError(f"{path}: a folder, a pipe or a device in the place of a file; {AGAIN}")
    if not path.is_file():
        raise LRQuantError(f"{path}: missing{unfinished_download(path.parent)}; {AGAIN}")
    try:
        with path.open("rb") as file:
            start = file.read(len(_LFS_POINTER))
    except OSError as error:
        raise LRQuantError(f"{path}: cannot be read ({error.strerror}); mend that first") from error
    if start == _LFS_POINTER:
        raise LRQuantError(
            f"{path}: a git-lfs pointer, not the weights themselves; run `git lfs pull` there"
        )
    if not start:
        raise LRQuantError(f"{path}: empty; {AGAIN}")
    return path


def file_state(path: Path) -> tuple[int, int]:
    """What changes with a file's content: its size, and when it was written."""
    return state_of(path.stat())


def state_of(status: os.stat_result) -> tuple[int, int]:
    """The same, of a file that is open."""
    return status.st_size, status.st_mtime_ns


def require_unchanged(path: Path, state: tuple[int, int]) -> None:
    """Refuse to read on in a file that somebody writes."""
    if not path.is_file() or file_state(path) != state:
        raise changed(path)


def changed(path: Path) -> LRQuantError:
    """The error to raise for a file that was written while it was read."""
    return LRQuantError(f"{path}: changed while it was read; leave the model alone and start again")


def unfinished_download(folder: Path) -> str:
    """Words about a download that stopped halfway in or for this folder, or nothing."""
    downloads = folder / ".cache" / "huggingface" / "download"
    for each in (folder, downloads, folder / "../../blobs"):
        for path in sorted(each.glob("*.incomplete")):
            return f", and {path.name} is a download that has not finished"
    return ""


def damaged(path: Path, error: Exception) -> LRQuantError:
    """The error to raise for a file that cannot be read to its end."""
    return LRQuantError(f"{path}: cut short or damaged ({first_line(error)}); {AGAIN}")


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def fingerprint_of(paths: Iterable[Path]) -> str:
    """SHA-256 over each file's name, size, first and last MiB, and 64 spread reads of 4 KiB."""
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\n".encode())
        spans = [(0, _MIB), (max(0, size - _MIB), _MIB)]
        spans += [(size * (2 * index + 1) // 128, 4096) for index in range(64)]
        with path.open("rb") as file:
            for start, length in spans:
                file.seek(start)
                digest.update(file.read(length))
    return digest.hexdigest()
