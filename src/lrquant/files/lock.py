"""Locks: who writes into a folder holds it until it is done or killed; others are told who."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from lrquant.errors import LRQuantError
from lrquant.files.whole import json_object

logger = logging.getLogger("lrquant")
FOLDER_LOCK = ".lrquant.lock"
_TRIES, _PAUSE = 5, 0.05
_HAS_NO_LOCKS = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS)


@contextmanager
def locked(path: Path, what: str, elsewhere: str) -> Iterator[bool]:
    """Hold the lock file `path`, and make its folder; the kernel lets go of it at any end.

    `what` is held; where another process holds it, LRQuantError says who, and to wait or to go
    `elsewhere`.  The file, and folders that were made and stayed empty, are removed at the end.
    Gives False, and the log says so, where the file system has no locks.
    """
    made: list[Path] = []
    try:
        acquired = _acquire(path, made)
    except OSError as error:
        raise LRQuantError(
            f"{what}: cannot be written ({error.strerror}: {error.filename or path}); {elsewhere}"
        ) from error
    if acquired is None:
        raise LRQuantError(f"{what}: held by {_holder(path)}; wait for it, or {elsewhere}")
    handle, refusal = acquired
    if refusal:
        words = "%s: not locked, its file system has no locks (%s); let nothing else write there"
        logger.warning(words, what, refusal)
    try:
        yield not refusal
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(handle)
        with suppress(OSError):
            for folder in made:
                folder.rmdir()


def _make_folders(folder: Path) -> list[Path]:
    """Make a folder; those of its parents and itself that were not there, the deepest first."""
    absent = []
    while not folder.exists() and not folder.is_symlink():
        absent.append(folder)
        folder = folder.parent
    for each in reversed(absent):
        each.mkdir(exist_ok=True)
    if not folder.is_dir():
        raise NotADirectoryError(0, "not a folder", str(folder))
    return absent


def _acquire(path: Path, made: list[Path]) -> tuple[int, str] | None:
    """A handle that holds the lock, None if another process does; adds the folders it made.

    With it why it is open only, in words, where the file system has no locks.
    """
    for _ in range(_TRIES):
        made += _make_folders(path.parent)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        except FileNotFoundError:
            continue  # a holder that is at its end has removed the folder, which was empty
        try:
            refusal = _lock(handle)
            if _is_at(handle, path):
                _sign(handle)
                return handle, refusal
        except BlockingIOError:
            time.sleep(_PAUSE)  # its holder may be at its end, or not have signed yet
        except OSError:
            os.close(handle)
            raise
        os.close(handle)
    return None


def _lock(handle: int) -> str:
    """Lock a file; the system's words where its file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _HAS_NO_LOCKS:
            raise
        return str(error.strerror)
    return ""


def _is_at(handle: int, path: Path) -> bool:
    """Whether the file that was locked is still the one of that name: its holder removes it."""
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except FileNotFoundError:
        return False


def _sign(handle: int) -> None:
    """Say in the lock file who holds it; a full disk is no reason not to."""
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    command = " ".join(["lrquant", *map(shlex.quote, sys.argv[1:])])[:300]
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": since, "command": command}
    with suppress(OSError):
        os.ftruncate(handle, 0)
        os.write(handle, json.dumps(holder).encode())


def _holder(path: Path) -> str:
    try:
        holder = json_object(path.read_bytes())
    except (OSError, ValueError):
        return "another process"
    who = f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"
    return f"{who} ({holder.get('command')})"
