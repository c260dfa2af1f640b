"""Other packages, installed out of the pages of docs/ that say how to write them.

``installed``  installed("add-a-grid.md") -> its package is there: its modules and entry points
``toys``       toys("add-a-grid.md") -> the modules of a page by name, imported
``process``    process(words, place) -> an ended process that has the package in a place, or none
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import pytest

import lrquant
from lrquant import architectures
from lrquant.data.declared import text_sources
from lrquant.formats.choice import formats
from lrquant.numerics.grids.grid import grid_kinds
from lrquant.numerics.losses import losses

DOCS = Path(__file__).parents[2] / "docs"
CACHES = (
    *(architectures.architectures, architectures.language_parts, architectures.towers),
    *(formats, grid_kinds, losses, text_sources),
)


def blocks_of(page: str, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def write_package(page: str, place: Path) -> list[str]:
    """Write the modules that a page names as `FILE.py`, in order, and its entry points."""
    text = (DOCS / page).read_text(encoding="utf-8")
    names = re.findall(r"all of (?:an? [^`]*)?`?(toy_\w+)\.py`", text)
    names = names or re.findall(r"`(toy_\w+)\.py`", text)
    code = [block for block in blocks_of(page, "python") if block.startswith('"""')]
    entries = "".join(
        block.replace('[project.entry-points."', "[").replace('"]', "]").replace('"', "")
        for block in blocks_of(page, "toml")
    )
    info = place / f"{names[0]}-1.0.dist-info"
    info.mkdir(parents=True)
    (place / f"{names[0]}.py").write_text(code[-1])
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {names[0]}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entries)
    return names[:1]


@pytest.fixture
def installed(tmp_path, monkeypatch) -> Iterator[Callable[[str], Path]]:
    pages: list[str] = []

    def install(page: str) -> Path:
        place = tmp_path / "site" / page.removesuffix(".md")
        pages.extend(write_package(page, place))
        monkeypatch.syspath_prepend(str(place))
        for cache in CACHES:
            cache.cache_clear()
        return place

    yield install
    for cache in CACHES:
        cache.cache_clear()
    for name in pages:
        sys.modules.pop(name, None)


@pytest.fixture
def toys(installed) -> Callable[[str], ModuleType]:
    def load(page: str) -> ModuleType:
        return importlib.import_module(write_name(installed(page)))

    return load


def write_name(place: Path) -> str:
    return next(place.glob("toy_*.py")).stem


@pytest.fixture(scope="session")
def process() -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(words: Sequence[object], place: Path | None) -> subprocess.CompletedProcess[str]:
        source = Path(lrquant.__file__).parents[1]
        paths = os.pathsep.join(str(path) for path in (place, source) if path is not None)
        environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
        environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # a second less where it is pytest
        command = [sys.executable, *map(str, words)]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    return run
