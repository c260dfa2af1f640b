"""The journal of a folder: every file that was written into it, with its hash.

By it nothing else is ever replaced or removed, and what is read is what was written.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path

from lrquant.errors import LRQuantError
from lrquant.files.whole import (
    as_bytes,
    flush,
    is_regular,
    json_object,
    read_plain,
    sha256_of,
    write_whole,
)
from lrquant.runs.mends import mend_of

JOURNAL = "lrquant-files.jsonl"
_ANY = "any"  # in place of a hash: a file that grows, such as a log


class Journal:
    """`lrquant-files.jsonl`: a line with path and SHA-256 before each file is renamed to its name.

    A line that says what the folder `holds` begins an era: what stands before it was given up.
    Files of the present era are read; files of any era may be replaced and removed, as long as
    their content is one that was written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / JOURNAL
        # whole lines as they were read last, and what they say
        self._whole_lines: tuple[bytes, list[dict[str, str]]] = (b"", [])

    @property
    def holds(self) -> str | None:
        """What the folder holds, "run" or "results"; None if it has no journal."""
        kinds = [line["holds"] for line in self._lines() if "holds" in line]
        return kinds[-1] if kinds else None

    def begin(self, holds: str) -> None:
        """Begin an era; the journal too, if there is none."""
        if self.path.exists():
            self._append({"holds": holds})
        else:
            write_whole(self.path, json.dumps({"holds": holds}) + "\n")

    def listed(self) -> dict[str, set[str]]:
        """Hashes of the present era by path."""
        files: dict[str, set[str]] = {}
        for line in self._lines():
            if "holds" in line:
                files.clear()
            else:
                files.setdefault(line["path"], set()).add(line["sha256"])
        return files

    def ever_listed(self) -> dict[str, set[str]]:
        """Hashes of all eras by path."""
        files: dict[str, set[str]] = {}
        for line in self._lines():
            if "path" in line:
                files.setdefault(line["path"], set()).add(line["sha256"])
        return files

    def _lines(self) -> list[dict[str, str]]:
        """Lines as they were written: one that a kill cut off is left out, as is a damaged one.

        Each is parsed once, as long as what stands before it does not change.
        """
        try:
            content = read_plain(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise LRQuantError(f"{self.path}: cannot be read ({error.strerror})") from error
        parsed, lines = self._whole_lines if content.startswith(self._whole_lines[0]) else (b"", [])
        end = content.rfind(b"\n") + 1
        lines = lines + [_parsed(text) for text in content[len(parsed) : end].split(b"\n")[:-1]]
        self._whole_lines = content[:end], lines
        lines = [*lines, _parsed(content[end:])]
        if not lines[0].keys() == {"holds"}:
            raise LRQuantError(
                f"{self.path}: not the list of a run's files, or damaged; restore it, or use "
                "another folder"
            )
        return [line for line in lines if line]

    def _append(self, line: dict[str, str]) -> None:
        handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW)
        try:
            size = os.fstat(handle).st_size
            cut_off = size and os.pread(handle, 1, size - 1) != b"\n"
            content = (b"\n" if cut_off else b"") + json.dumps(line).encode() + b"\n"
            if os.write(handle, content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(handle)
        finally:
            os.close(handle)

    def claim_growing(self, name: str) -> Path:
        """List a file that grows, which is then the folder's own whatever it holds; its path."""
        self.require_own([name])
        if _ANY not in self.listed().get(name, set()):
            self._append({"path": name, "sha256": _ANY})
        return self.folder / name

    def write(self, name: str, content: str | bytes, damaged_too: bool = False) -> None:
        """Write a file, whole or not at all; refuses to replace one that is not the folder's.

        With `damaged_too`, what was written here and changed since is replaced as well.
        """
        content = as_bytes(content)
        if not (damaged_too and name in self.listed() and is_regular(self.folder / name)):
            self.require_own([name])
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        line = {"path": name, "sha256": hashlib.sha256(content).hexdigest()}
        write_whole(path, content, partial(self._append, line))

    def read(self, name: str) -> bytes:
        """A file of the present era; LRQuantError with what mends it if it is not as written."""
        path, mend = self.folder / name, mend_of(name)
        try:
            content = read_plain(path)
        except FileNotFoundError as error:
            raise LRQuantError(f"{path}: missing; {mend}") from error
        except OSError as error:
            raise LRQuantError(
                f"{path}: cannot be read ({error.strerror}); see to its permissions or disk"
            ) from error
        hashes = self.listed().get(name, set())
        if hashlib.sha256(content).hexdigest() not in hashes:
            said = "changed or damaged since it was written" if hashes else "not of this run"
            raise LRQuantError(f"{path}: {said}; {mend}")
        return content

    def owns(self, name: str) -> bool:
        """Whether the file there is one that was written here, in any era."""
        return self._owns(name, self.ever_listed())

    def _owns(self, name: str, listed: dict[str, set[str]]) -> bool:
        path, hashes = self.folder / name, listed.get(name, set())
        if not hashes or not is_regular(path):
            return False
        return _ANY in hashes or sha256_of(path) in hashes

    def require_own(self, names: Iterable[str]) -> None:
        """Refuse if a file of these names is there and was not written here as it is."""
        listed = self.ever_listed()
        for name in names:
            path = self.folder / name
            if os.path.lexists(path) and not self._owns(name, listed):
                raise LRQuantError(
                    f"{path}: changed or damaged since it was written; {mend_of(name)}"
                    if name in listed
                    else f"{path}: not of a run, and would be replaced; move it away, or use "
                    "another folder"
                )

    def remove_earlier(self) -> None:
        """Remove the files of eras before the present one, as far as they are as written."""
        present = self.listed()
        for name, hashes in self.ever_listed().items():
            if _ANY not in hashes and name not in present and self.owns(name):
                self.remove(name)

    def remove(self, name: str) -> None:
        """Remove one file, and its folder if that is empty then."""
        path = self.folder / name
        path.unlink()
        flush(path.parent)
        while path.parent != self.folder:
            path = path.parent
            try:
                path.rmdir()
            except OSError:
                return


def _parsed(text: bytes) -> dict[str, str]:
    """A line of the journal, nothing if it is none."""
    with suppress(ValueError):
        line = json_object(text)
        right = line.keys() in ({"path", "sha256"}, {"holds"})
        inside = not {"", "..", "."} & set(str(line.get("path", "file")).split("/"))
        if right and inside and all(isinstance(value, str) for value in line.values()):
            return line
    return {}
