"""Places that a checkpoint must not hold or lie in: the run, the model, the data, homes, .git."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lrquant.config.groups import Places
from lrquant.errors import LRQuantError
from lrquant.files.publishing import require_replaceable
from lrquant.files.whole import require_writable
from lrquant.measures.choice import read_by_measures

_ONLY_HELD = ("the current directory", "a home folder")


def check_target(places: Places, target: Path) -> None:
    """Refuse, before any hour is spent, what could not be written or would destroy other files."""
    place = target.resolve()
    if place == Path(places.output_dir).resolve():
        raise LRQuantError(f"--save_dir {target}: this is the run folder; use another one")
    for what, other in _kept(places):
        inside = what not in _ONLY_HELD and other.is_dir() and other in place.parents
        if place == other or place in other.parents or inside:
            said = "lies in" if inside and place != other else "is, or holds,"
            raise LRQuantError(f"--save_dir {target}: {said} {what} ({other}); use another folder")
    if (place / ".git").exists() or ".git" in place.parts:
        raise LRQuantError(f"--save_dir {target}: is, or lies in, a repository; use a new folder")
    require_replaceable(place, places.overwrite)
    require_writable(place.parent, "--save_dir")


def _kept(places: Places) -> Iterator[tuple[str, Path]]:
    """What must stay as it is, by what to call it; only what is there, links resolved."""
    data = [places.calib_dataset, places.calib_images, places.act_scales, places.act_shifts]
    data += read_by_measures(places.measuring)
    data += _sets(places.data_dir)
    named: list[tuple[str, str | None]] = [
        ("the run folder", places.output_dir),
        ("the run that is resumed", places.resume),
        ("the model", places.model),
        ("what is compared with", places.compare if isinstance(places.compare, str) else None),
        *(("the data", path) for path in data),
        ("the current directory", "."),
    ]
    for what, name in named:
        path = Path(name).expanduser() if name else None
        if path is not None and path.exists():
            yield what, path.resolve()
    yield from (("a home folder", home.resolve()) for home in _homes())


def _sets(data_dir: str | None) -> list[str]:
    """The sets in a data folder, beside which a checkpoint may well be written."""
    folder = Path(data_dir).expanduser() if data_dir else None
    if folder is None or not folder.is_dir():
        return []
    return [str(path) for path in folder.iterdir() if path.is_dir() and not _is_checkpoint(path)]


def _is_checkpoint(path: Path) -> bool:
    return (path / "config.json").exists() or path.name.startswith(".")


def _homes() -> Iterator[Path]:
    try:
        yield Path.home()
    except RuntimeError:
        return
