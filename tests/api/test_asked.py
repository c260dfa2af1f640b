"""What a caller in Python sees of progress: bars where there is something to show them on."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
from rich.console import Console

from lrquant.api import asked
from lrquant.api.asked import shown_progress
from lrquant.runs.bars import BarProgress
from lrquant.runs.progress import Progress


class Output:
    """As much of a notebook's widget as rich uses."""

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *error: object) -> None: ...

    def clear_output(self, wait: bool) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def notebook(monkeypatch):
    """notebook(widgets) -> what a notebook is shown."""
    shown: list[object] = []

    def begin(widgets: bool) -> list[object]:
        for name in ("IPython", "IPython.display", "ipywidgets"):
            module = ModuleType(name)
            module.__spec__ = ModuleSpec(name, None)
            monkeypatch.setitem(sys.modules, name, module)
        sys.modules["IPython.display"].display = shown.append
        sys.modules["ipywidgets"].Output = Output
        if not widgets:
            monkeypatch.setitem(sys.modules, "ipywidgets", None)
            monkeypatch.setattr(asked, "find_spec", lambda name: None)
        monkeypatch.setattr(asked, "Console", lambda stderr: Console(force_jupyter=True))
        return shown

    return begin


def learn(progress: Progress) -> None:
    with progress.blocks(2, 1, 3, lambda: 0):
        progress.stepper(0)(3, 0.5)
        progress.finished(0, None)
    with progress.measuring("measuring", 2) as tell:
        tell(0)


def test_a_notebook_shows_bars_where_it_has_widgets(notebook):
    shown = notebook(widgets=True)
    progress = shown_progress(None)
    learn(progress)
    assert isinstance(progress, BarProgress) and isinstance(shown[0], Output)


def test_a_notebook_without_widgets_shows_nothing(notebook, recwarn):
    shown = notebook(widgets=False)
    learn(shown_progress(None))
    assert shown == [] and not recwarn.list


def test_what_is_asked_of_progress(capsys):
    own = Progress()
    assert shown_progress(own) is own and not isinstance(shown_progress(False), BarProgress)
    learn(shown_progress(None))
    assert capsys.readouterr() == ("", ""), "a pipe is no terminal"
