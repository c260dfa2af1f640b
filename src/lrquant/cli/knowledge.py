"""Commands that say what there is and which of it to take; they import nothing that computes."""

from __future__ import annotations

import argparse
from importlib.resources import files
from typing import TYPE_CHECKING

from lrquant.cli.completion import SHELLS, completion_script
from lrquant.cli.listing import KINDS, listed
from lrquant.errors import LRQuantError, nearest

if TYPE_CHECKING:
    from lrquant.cli.screen import Screen


def show_list(options: argparse.Namespace, screen: Screen) -> None:
    """`lrquant list`."""
    if options.kind not in KINDS:
        near = nearest(options.kind, KINDS)
        raise LRQuantError(f"list {options.kind}: use one of {', '.join(KINDS)}{near}")
    columns = screen.width if screen.is_terminal else None
    screen.say(listed(options.kind, options.word, columns))


def show_guide(options: argparse.Namespace, screen: Screen) -> None:
    """`lrquant guide`: the page, rendered where it is read in a terminal."""
    text = files("lrquant.cli").joinpath("guide.md").read_text(encoding="utf-8")
    if not screen.is_terminal:
        screen.say(text.rstrip("\n"))
        return
    from rich.markdown import Markdown

    screen.print(Markdown(text))


def show_completion(options: argparse.Namespace, screen: Screen) -> None:
    """`lrquant completion`."""
    if options.shell not in SHELLS:
        raise LRQuantError(f"completion {options.shell}: use one of {', '.join(SHELLS)}")
    screen.say(completion_script(options.shell, *options.parsers(every=True)))
