"""Completion: the script by which a shell completes commands, flags, their choices and paths."""

from __future__ import annotations

from lrquant.cli.flags import Parser
from lrquant.errors import LRQuantError

SHELLS = ("bash", "zsh", "fish")
_FOLDERS = ("DIR", "RUN")
_PATHS = ("PATH", "FILE", "TARGET", "BASE")


def completion_script(shell: str, top: Parser, commands: dict[str, Parser]) -> str:
    """A script for `shell`, made by shtab from the parser."""
    try:
        import shtab
    except ImportError as error:
        raise LRQuantError("completion: needs shtab; run `pip install shtab`") from error
    for command in commands.values():
        for action in command._actions:
            words = str(action.metavar or "")
            if words in _FOLDERS:
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
            elif words in _PATHS:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
            elif "|" in words and not words.endswith("…"):
                action.choices = words.split("|")
    return shtab.complete(top, shell)
