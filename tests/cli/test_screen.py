"""Standard output and error of any kind, Ctrl-C at any time: one line, never a traceback."""

from __future__ import annotations

import io
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import lrquant
from lrquant.cli import commands as cli
from lrquant.cli import main
from lrquant.cli.screen import Screen, log_to
from lrquant.errors import LRQuantError, visible

SOURCE = Path(lrquant.__file__).parent.parent


@pytest.fixture
def shown(monkeypatch):
    """What `inspect` shows, in place of what it would find."""
    return lambda text: monkeypatch.setattr(
        "lrquant.api.functions.inspect_folder", lambda target: text
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3 ± 1 – …", "3 ± 1 – …"),
        ("a\x1b[31mred\x07", r"a\x1b[31mred\x07"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("back\rwards\x08", r"back\x0dwards\x08"),
        ("\x9b2J", r"\x9b2J"),
        ("gpj.\u202eexe", r"gpj.\u202eexe"),
    ],
)
def test_text_of_others_commands_no_terminal(text, expected, shown, capsys):
    assert visible(text) == expected
    shown(text)
    assert main(["inspect", "x"]) == 0
    assert capsys.readouterr().out == expected + "\n"


def test_an_error_is_one_line_of_visible_characters():
    error = LRQuantError("model a\x1b]0;x\x07\nb\u2028c: gone")
    assert str(error) == r"model a\x1b]0;x\x07 b c: gone"


def test_log_lines_are_visible_characters(capsys, tmp_path):
    log_to(Screen())
    logging.getLogger("lrquant").warning("picture left out: %s", "a\x1b[2J.png")
    assert capsys.readouterr().out == "picture left out: a\\x1b[2J.png\n"


def test_standard_output_in_ascii(shown, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    shown("3 ± 1, caf\udce9")
    assert main(["inspect", "x"]) == 0
    sys.stdout.flush()
    assert raw.getvalue() == b"3 \\xb1 1, caf\\udce9\n"


def without(monkeypatch, stream, place):
    """Standard output that goes to `place`, or a pipe that nobody reads."""
    if place is None:
        reading, writing = os.pipe()
        os.close(reading)
        monkeypatch.setattr(sys, stream, os.fdopen(writing, "w"))
    else:
        monkeypatch.setattr(sys, stream, open(place, "w"))  # noqa: SIM115


@pytest.mark.parametrize(
    ("place", "reason"), [("/dev/full", "No space left on device"), (None, "Broken pipe")]
)
@pytest.mark.parametrize("through", ["say", "log"])
def test_standard_output_that_takes_nothing(place, reason, through, shown, monkeypatch, capsys):
    """Said at the end; what a command does is done, and nothing more fails at exit."""
    ended = []

    def inspect(target):
        if through == "log":
            logging.getLogger("lrquant").info("a line")
        ended.append(target)
        return "found"

    monkeypatch.setattr("lrquant.api.functions.inspect_folder", inspect)
    without(monkeypatch, "stdout", place)
    assert main(["inspect", "x"]) == 2
    sys.stdout.close()
    assert len(ended) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"lrquant: standard output: {reason}; what was asked is done")
    assert error.count("\n") == 1


def test_standard_error_that_takes_nothing(monkeypatch):
    without(monkeypatch, "stderr", "/dev/full")
    assert main(["inspect", "absent"]) == 2


def test_streams_that_were_closed(monkeypatch, shown):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["inspect", "absent"]) == 2
    shown("found")
    assert main(["inspect", "x"]) == 0


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--scheme", ""], "lrquant: --scheme '': empty"),
        (["--scheme="], "lrquant: --scheme '': empty"),
        (["--output_dir", " "], "lrquant: --output_dir '': empty"),
        (["--resume", ""], "lrquant: --resume '': empty"),
        (["--ppl", ","], "lrquant: --ppl ',': names nothing"),
        (["--vqa", " , "], "lrquant: --vqa ' , ': names nothing"),
        (["--agreement", ","], "lrquant: --agreement ',': names nothing"),
        (["--let_sites", ","], "lrquant: --let-sites ',': names nothing"),
        (["--model", "m", "--tasks", ","], "lrquant: tasks ',': names no task"),
        (["--model", "caf\udce9"], "lrquant: --model: 'caf\\udce9' holds"),
        (["--nsamples", "1" + "0" * 20], "lrquant: nsamples 100000000000000000000: use a whole"),
        (["--rotate_rank", "1e20"], "lrquant: --rotate-rank: expected a whole number"),
    ],
)
def test_arguments_that_say_nothing_or_too_much(arguments, line, capsys):
    assert main(["quantize", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(line) and error.count("\n") == 1


def test_an_empty_target_is_not_the_present_folder(capsys):
    for command in ("evaluate", "inspect", "report"):
        assert main([command, ""]) == 2
        assert capsys.readouterr().err == (
            f"lrquant: {command} '': empty; give a value, or leave it out\n"
        )


# Ctrl-C


@pytest.mark.parametrize("command", ["check", "inspect"])
def test_an_interrupted_command_that_learns_nothing(command, monkeypatch, capsys):
    def stopped(options, screen):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, f"_{command}", stopped)
    assert main([command, *(["x"] if command == "inspect" else [])]) == 130
    assert capsys.readouterr().err == "lrquant: interrupted\n"


@pytest.fixture
def interrupted_import(tmp_path):
    """Run Python where importing that module is when Ctrl-C comes."""

    def run(module, *arguments):
        (tmp_path / f"{module}.py").write_text("raise KeyboardInterrupt\n")
        path = os.pathsep.join([str(tmp_path), str(SOURCE)])
        done = subprocess.run(
            [sys.executable, *arguments],
            **{"env": {**os.environ, "PYTHONPATH": path}, "capture_output": True, "text": True},
        )
        return done.returncode, done.stderr

    return run


@pytest.mark.parametrize("module", ["yaml", "rich", "torch"])
def test_ctrl_c_while_libraries_are_imported(interrupted_import, module):
    """No block is learned yet that could be gone on with."""
    for command in ("quantize", "check", "stats"):
        words = ("-m", "lrquant", command)
        assert interrupted_import(module, *words) == (130, "lrquant: interrupted\n")


def test_ctrl_c_while_another_program_imports_is_its_own_affair(interrupted_import):
    code, error = interrupted_import("torch", "-c", "from lrquant import quantize")
    assert code in (130, -signal.SIGINT) and error.splitlines()[-1] == "KeyboardInterrupt"
