"""Tables in a terminal: as they are where they fit, row by row where not."""

from __future__ import annotations

import pytest

from lrquant.cli.screen import Screen
from lrquant.cli.tables import fitted
from lrquant.measures.rows import table

HEAD = ["perplexity, W4A4", "full precision", "round-to-nearest", "LRQuant+"]
ROWS = [["wikitext2, n = 4 of 689", "29.19", "50204", "50121"], ["c4", "", "2184.06", "84.90"]]
TABLE = table(HEAD, ROWS)


def test_what_fits_stays():
    text = f"before\n\n{TABLE}\n\nafter"
    assert fitted(text, max(map(len, text.splitlines()))) == text


@pytest.mark.parametrize("columns", [30, 60])
def test_what_does_not_fit_comes_row_by_row(columns):
    told = fitted(f"before\n\n{TABLE}\n\nafter, which is no table, however long it may be", columns)
    assert told.splitlines() == [
        *("before", "", "perplexity, W4A4", "wikitext2, n = 4 of 689"),
        *("  full precision    29.19", "  round-to-nearest  50204", "  LRQuant+          50121"),
        *("c4", "  round-to-nearest  2184.06", "  LRQuant+          84.90"),
        *("", "after, which is no table, however long it may be"),
    ]


def test_only_the_table_that_is_too_wide_changes():
    narrow = table(["a", "b"], [["1", "2"]])
    assert fitted(f"{narrow}\n\n{TABLE}", 40).startswith(narrow)


@pytest.mark.parametrize("terminal", [True, False])
def test_the_screen_fits_tables_in_a_terminal_alone(terminal, capsys, monkeypatch):
    monkeypatch.setattr(Screen, "is_terminal", terminal)
    monkeypatch.setattr(Screen, "width", 40)
    Screen().say(TABLE)
    assert (TABLE in capsys.readouterr().out) != terminal
