"""The scripts of benchmarks/ as modules."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """A module of benchmarks/, by its name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.fixture
def printed():
    """Rows of whole numbers that code with the scripts at hand prints, in a process of its own."""

    def rows(code):
        places = ":".join(map(str, (FOLDER.parent / "src", FOLDER)))
        words, settings = [sys.executable, "-c", code], {"PYTHONPATH": places}
        done = subprocess.run(words, env=settings, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return [tuple(map(int, line.split())) for line in done.stdout.splitlines()]

    return rows
