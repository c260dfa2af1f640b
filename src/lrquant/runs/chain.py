"""The chain of a part's blocks: each file names the SHA-256 of the one before it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from lrquant.files.whole import JsonObject, read_plain
from lrquant.runs.block_file import Header, header_of
from lrquant.runs.journal import Journal


@dataclass(frozen=True)
class _Link:
    """A block's file: its hash, and its header; None if it has none."""

    sha256: str
    header: Header | None


class Chain:
    """Blocks from the first on, as far as each is there and follows the one that is before it now.

    A file that is not as it was written breaks no chain: it counts, so that reading it refuses it
    by its name.  Each file is read once, as long as it does not change.
    """

    def __init__(self, journal: Journal, name: Callable[[int], str]) -> None:
        self._journal, self._name = journal, name
        self._read: dict[str, tuple[tuple[int, ...], _Link]] = {}

    def finished(self) -> int:
        """How many blocks follow one another."""
        listed = self._journal.listed()
        count = 0
        while self._is_there(count, listed) and self._follows(count, listed):
            count += 1
        return count

    def hash_before(self, index: int) -> str:
        """The hash of the file that block `index` comes after; empty for the first."""
        return self._link(index - 1).sha256 if index else ""

    def about(self, index: int) -> JsonObject | None:
        """What a block's header says of its learning; None if the file is none."""
        header = self._link(index).header
        return None if header is None else header.about

    def _is_there(self, index: int, listed: dict[str, set[str]]) -> bool:
        name = self._name(index)
        return name in listed and (self._journal.folder / name).is_file()

    def _follows(self, index: int, listed: dict[str, set[str]]) -> bool:
        own = self._link(index)
        if not index or own.header is None or own.sha256 not in listed[self._name(index)]:
            return True
        before, written = self._link(index - 1), listed[self._name(index - 1)]
        possible = {before.sha256} if before.sha256 in written else written
        return own.header.after in possible

    def _link(self, index: int) -> _Link:
        name = self._name(index)
        path = self._journal.folder / name
        try:
            status = path.stat()
            state = status.st_ino, status.st_size, status.st_mtime_ns
            if name not in self._read or self._read[name][0] != state:
                content = read_plain(path)
                link = _Link(hashlib.sha256(content).hexdigest(), _header(content))
                self._read[name] = state, link
        except OSError:
            return _Link("", None)
        return self._read[name][1]


def _header(content: bytes) -> Header | None:
    try:
        return header_of(content)
    except ValueError:
        return None
