"""Every command with its flags, as the parsers of the command line have them."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from unittest.mock import patch

from lrquant.cli.entry import main
from site_parts.tables import code, table


class _Caught(BaseException):
    """The parser of the whole command line, on its way out of it."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line, with the help of every flag."""

    def caught(self: argparse.ArgumentParser, *words: object) -> None:
        raise _Caught(self)

    with patch.object(argparse.ArgumentParser, "parse_args", caught):
        try:
            main(["quantize", "--help-all"])
        except _Caught as catch:
            return catch.parser
    raise RuntimeError("the command line has no parser of argparse any more; mend this file")


def command_parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of each command, in the order of the help."""
    (choices,) = [
        action.choices
        for action in parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    ]
    return dict(choices)


def markdown() -> str:
    """A section a command: what it does, its arguments, its flags by group."""
    return "\n\n".join(
        f"## lrquant {name}\n\n{_sentence(command)}\n\n{_sections(command)}"
        for name, command in command_parsers().items()
    )


def _sentence(command: argparse.ArgumentParser) -> str:
    text = " ".join((command.description or "").split())
    return f"{text[:1].upper()}{text[1:]}." if text and not text.endswith(".") else text


def _sections(command: argparse.ArgumentParser) -> str:
    groups = [(group.title or "", list(_shown(group))) for group in command._action_groups]
    groups = [(title, actions) for title, actions in groups if actions]
    usual = ("positional arguments", "options")
    return "\n\n".join(
        ("" if title in usual else f"**{title[:1].upper()}{title[1:]}**\n\n")
        + table(("argument", "meaning"), [(_words(a), _meaning(a, command)) for a in actions])
        for title, actions in groups
    )


def _shown(group: argparse._ArgumentGroup) -> Iterator[argparse.Action]:
    for action in group._group_actions:
        if action.help != argparse.SUPPRESS and not isinstance(action, argparse._HelpAction):
            yield action


def _words(action: argparse.Action) -> str:
    """A flag with its value as it is typed; `--no-…` beside a switch."""
    if not action.option_strings:
        several = "…" if action.nargs in ("+", "*") else ""
        return code(f"{action.metavar or action.dest}{several}")
    flags = ", ".join(map(code, action.option_strings))
    if action.nargs == 0 or not isinstance(action.metavar, str):
        return flags
    value = f"[{action.metavar}]" if action.nargs == "?" else action.metavar
    return flags[:-1] + f" {value}`"


def _meaning(action: argparse.Action, command: argparse.ArgumentParser) -> str:
    text = action.help or ""
    return command._get_formatter()._expand_help(action) if text else ""
