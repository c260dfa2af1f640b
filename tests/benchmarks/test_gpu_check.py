"""The check of a GPU, without one: every part but the compiler's runs, and errors become rows."""

from __future__ import annotations

import json
import sys

import pytest

COMPILING = ("compiled codes", "quantizers")  # tests/numerics compile


@pytest.fixture
def run(script, monkeypatch, tmp_path):
    module = script("gpu_check")

    def check(*words):
        monkeypatch.setenv("OUT", str(tmp_path))
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", *words])
        code = module.main()
        return code, json.loads((tmp_path / "gpu_check.json").read_text())

    return check


def test_all_of_it_runs_on_a_cpu(run, script):
    code, rows = run("right", "fast", "--small", "--without", *COMPILING)
    assert code == 0 and not [row for row in rows if row["right"] is False]
    parts = [name for half in script("gpu_check").PARTS.values() for name in half]
    assert {row["part"] for row in rows} == {*parts} - {*COMPILING}


def test_what_raises_is_a_row_and_the_rest_goes_on(run, script, monkeypatch, capsys):
    def broken(check):
        raise ValueError("out of order")

    module = script("gpu_check")
    parts = {"broken": broken, "machine": module.machine}
    monkeypatch.setitem(module.PARTS, "fast", parts)
    code, rows = run("fast", "--small")
    assert code == 1 and rows[0]["part"] == "broken"
    assert rows[0]["value"] == "ValueError: out of order" and rows[0]["right"] is False
    assert len(rows) > 1 and "failed: 1 of" in capsys.readouterr().out


def test_what_the_time_does_not_reach_says_so(run, script, monkeypatch):
    monkeypatch.setitem(script("gpu_check").SECONDS, "fast", -1)
    code, rows = run("fast", "--small")
    assert code == 0 and {row["value"] for row in rows} == {"not begun: -1 s are over"}
