"""Publishing a checkpoint: written beside its place, moved there whole, an older one moved aside.

Nothing is removed but what `lrquant.sha256` lists, as long as it is as it was written.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from lrquant.errors import LRQuantError
from lrquant.files.lock import locked
from lrquant.files.whole import flush, is_regular, read_plain, sha256_of

HASHES = "lrquant.sha256"


@contextmanager
def published(target: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to write a checkpoint into; at the end it is `target`, if nothing went wrong.

    For who holds `target_lock`.  A kill leaves the older checkpoint or the new one, perhaps beside
    its place: `heal` puts it there.
    """
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    heal(target)
    staging = target.parent / f"{_prefix(target)}{secrets.token_hex(16)}.staging"
    staging.mkdir(mode=0o700)
    try:
        place = staging / "new"
        place.mkdir()
        yield place
        _write_hashes(place)
        require_replaceable(target, overwrite)
        if target.exists():
            os.rename(target, staging / "old")
        os.rename(place, target)
        flush(target.parent)
    finally:
        heal(target)


def target_lock(target: Path) -> AbstractContextManager[bool]:
    """Hold a checkpoint's place against other processes."""
    target = target.resolve()
    path = target.parent / f"{_prefix(target)[:-1]}.lock"
    return locked(path, f"--save_dir {target}", "use another folder")


def heal(target: Path) -> None:
    """Finish or undo what a kill cut off while `target` was published; for who holds its lock."""
    target = target.resolve()
    for staging in target.parent.glob(f"{_prefix(target)}*.staging"):
        if staging.is_symlink() or staging.stat().st_uid != os.geteuid():
            continue
        old = staging / "old"
        if old.is_dir() and not target.exists():
            os.rename(old, target)
            flush(target.parent)
        if old.is_dir():
            _remove_listed(old)
        shutil.rmtree(staging / "new", ignore_errors=True)
        with suppress(OSError):
            staging.rmdir()


def require_replaceable(target: Path, overwrite: bool) -> None:
    """Refuse a place with anything but a checkpoint that is as it was written, and `overwrite`."""
    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir():
        raise LRQuantError(f"--save_dir {target}: a file; use another folder")
    if not any(target.iterdir()):
        return
    other = _first_other(target)
    if other is not None:
        raise LRQuantError(
            f"--save_dir {target}: {other}, so it is not replaced; move it away, or use a new "
            "folder"
        )
    if not overwrite:
        raise LRQuantError(
            f"--save_dir {target}: holds a checkpoint; replace it with --overwrite, or use another "
            "folder"
        )


def _first_other(place: Path) -> str | None:
    """What in a folder is not as a checkpoint of this package was written, None if all is."""
    if not is_regular(place / HASHES):
        return f"holds files that are no checkpoint of lrquant with its {HASHES}"
    hashes = read_hashes(place)
    for name, path in _files(place):
        if name not in hashes and name != HASHES:
            return f"{name} is not of the checkpoint there"
        if name != HASHES and (not is_regular(path) or sha256_of(path) != hashes[name]):
            return f"{name} was changed since it was written"
    return None


def _files(place: Path) -> list[tuple[str, Path]]:
    """All that is in a folder but folders, by relative path; links are not followed."""
    paths = [
        Path(folder, name)
        for folder, folders, files in os.walk(place)
        for name in (*files, *(name for name in folders if Path(folder, name).is_symlink()))
    ]
    return sorted((path.relative_to(place).as_posix(), path) for path in paths)


def _folders(place: Path) -> list[Path]:
    """A folder and those inside, the deepest first."""
    return [Path(folder) for folder, _, _ in os.walk(place, topdown=False)]


def _write_hashes(place: Path) -> None:
    """List every file as `sha256sum` does, and wait until all are on the disk."""
    files = _files(place)
    lines = [f"{sha256_of(path)}  {name}\n" for name, path in files]
    (place / HASHES).write_text("".join(lines), encoding="utf-8")
    for path in (*(path for _, path in files), place / HASHES, *_folders(place)):
        flush(path)


def read_hashes(place: Path) -> dict[str, str]:
    """SHA-256 of a checkpoint's files by relative path, as they were written."""
    text = read_plain(place / HASHES).decode("utf-8", "replace")
    pairs = [line.partition("  ") for line in text.splitlines()]
    return {name: value for value, _, name in pairs}


def _remove_listed(place: Path) -> None:
    """Remove a checkpoint's own files, their list last; what else came into its folder stays."""
    hashes = read_hashes(place) if is_regular(place / HASHES) else {}
    own = [path for name, path in _files(place) if name in hashes and is_regular(path)]
    for path in (*own, *([place / HASHES] if hashes else [])):
        path.unlink()
    for folder in _folders(place):
        with suppress(OSError):
            folder.rmdir()


def _prefix(target: Path) -> str:
    """How the names of what belongs to this target begin, beside it."""
    return f".lrquant-{hashlib.sha256(target.name.encode()).hexdigest()[:16]}-"
