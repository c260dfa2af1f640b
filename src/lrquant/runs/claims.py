"""Claims of a folder: the names that a run needs in it, and whether they are free."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lrquant.errors import LRQuantError
from lrquant.files.lock import FOLDER_LOCK, locked
from lrquant.files.whole import remove_temporaries
from lrquant.runs.journal import JOURNAL, Journal
from lrquant.runs.mends import AFTER_BLOCKS

_FILES = (
    *("config.yaml", "run.json", "run.log", "blocks.jsonl", "results.json"),
    *("report.html", "report.md", "report.json", "calibration.safetensors"),
)
_FOLDERS = ("blocks", "diagnostics", *AFTER_BLOCKS, "tower", "tasks")
NAMES = {"run": (*_FILES, *_FOLDERS), "results": ("results.json", "run.log", "tasks")}
OWN = {*_FILES, *_FOLDERS, JOURNAL, FOLDER_LOCK}
_IN_PARTS = ("blocks", "diagnostics", *(f"{stage}/*" for stage in AFTER_BLOCKS))
_OF_BLOCKS = (*_IN_PARTS, *(f"tower/{folder}" for folder in _IN_PARTS))
_WORDS = {"run": "a run", "results": "results of `lrquant evaluate`"}
_MEND = "use another --output_dir"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Lock a run's folder, made if need be, and remove what kills left half written.

    Where there are no locks nothing is removed: another process may be writing it.
    """
    with locked(folder / FOLDER_LOCK, f"run folder {folder}", _MEND) as alone:
        for pattern in (".", "tower", "tasks", *_OF_BLOCKS) if alone else ():
            for place in folder.glob(pattern) if "*" in pattern else [folder / pattern]:
                remove_temporaries(place)
        yield


def require_claimable(folder: Path, holds: str) -> None:
    """Refuse a folder in which a name that a run, or results alone, need is someone else's."""
    journal = Journal(folder)
    if (folder / "config.json").exists():
        raise LRQuantError(f"run folder {folder}: a model's folder (config.json); {_MEND}")
    if journal.holds not in (None, holds):
        held = _WORDS.get(str(journal.holds), "something else")
        raise LRQuantError(f"run folder {folder}: holds {held}; {_MEND}")
    if journal.holds is not None:
        journal.require_own(_needed(folder) if holds == "run" else ("results.json", "run.log"))
        return
    taken = [name for name in NAMES[holds] if _holds_something(folder / name)]
    if taken:
        raise LRQuantError(
            f"run folder {folder}: holds files that are not of a run of this version, under names "
            f"that it needs ({', '.join(taken)}); move them away, or {_MEND}"
        )


def _needed(folder: Path) -> Iterator[str]:
    """Names that a run writes, as far as they can be told before."""
    yield from (*_FILES, "tower/blocks.jsonl")
    for pattern in _OF_BLOCKS:
        for path in folder.glob(f"{pattern}/*.safetensors"):
            if re.fullmatch(r"\d{4}", path.stem):
                yield path.relative_to(folder).as_posix()


def _holds_something(path: Path) -> bool:
    """Whether a file, or a folder that is not empty, is there."""
    if path.is_dir() and not path.is_symlink():
        return any(path.iterdir())
    return os.path.lexists(path)
