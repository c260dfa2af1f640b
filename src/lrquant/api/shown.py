"""How a run and a text show themselves where Python shows a value: a terminal, a notebook."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape


class Shown(str):
    """A text of lines that is shown as it reads."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return f"<pre>{escape(self)}</pre>"


def html_table(title: str, rows: Iterable[tuple[str, str]]) -> str:
    """Rows of a name and a text under a title; all of it is escaped."""
    cell = '<td style="text-align:left">'
    lines = "".join(
        f'<tr><th style="text-align:left">{escape(name)}</th>{cell}{escape(text)}</td></tr>'
        for name, text in rows
    )
    return f"<table><caption>{escape(title)}</caption>{lines}</table>"
