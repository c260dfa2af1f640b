"""A run of two processes: the bytes and the measures of one process, also after a kill."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lrquant import quantize
from lrquant.cli import main
from lrquant.runs.folder import RunFolder
from lrquant.team.processes import Ended

SCRIPT = Path(__file__).with_name("quantize.py")
TEXT = "".join(f"{number} times {number} is {number * number}. " for number in range(200))
SETTINGS = {
    **{"lr_plus": True, "epochs": 2, "nsamples": 6, "seqlen": 16, "report": False},
    **{"batch_size": 4, "precision": "float32", "device": "cpu"},
}
MEASURED = ("perplexity", "agreement")


def words_of(settings: dict) -> list[str]:
    words = []
    for name, value in settings.items():
        flag = "--" + ("no-" if value is False else "") + name.replace("_", "-")
        words += [flag] if isinstance(value, bool) else [flag, str(value)]
    return words


def blocks(run: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((run / "blocks").iterdir())]


@pytest.fixture
def asked(model_folder, tmp_path):
    """The settings of a run in a folder of the given name."""
    text, model = tmp_path / "text.txt", model_folder("llama")
    text.write_text(TEXT)
    names = {"calib_dataset": str(text), "ppl": str(text), "agreement": str(text)}

    def make(name: str) -> dict:
        places = {"model": str(model), "scheme": "W4A4", "output_dir": str(tmp_path / name)}
        return {**places, **SETTINGS, **names}

    return make


def test_two_processes_learn_and_measure_what_one_does(start, asked, tmp_path, monkeypatch):
    """One is killed, the run is gone on with by two, and by one; the last step has two samples."""
    settings = asked("alone")
    words = {"ppl": (settings["ppl"],), "agreement": (settings["agreement"],)}
    alone = quantize(**{**settings, **words})
    command = [SCRIPT, "quantize", *words_of(asked("run")), "--no-save"]

    monkeypatch.setenv("KILLED", "1")
    code, lines = start(2, *command)
    assert code != 0 and lines == [f"lrquant: {Ended()}"]
    monkeypatch.delenv("KILLED")
    run, expected = tmp_path / "run", blocks(tmp_path / "alone")
    assert blocks(run) == expected[:1]

    shutil.copytree(run, tmp_path / "other")
    assert start(2, *command, "--resume") == (0, [])
    resumed = quantize(**{**asked("other"), **words, "resume": str(tmp_path / "other")})
    assert blocks(run) == blocks(tmp_path / "other") == expected
    results = RunFolder.open(run).results()
    for kind in MEASURED:
        assert results[kind] == alone.results[kind] == resumed.results[kind]


def test_what_processes_do_not_do_together_the_first_does(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main(["inspect", str(tmp_path)]) == 0, "not even read"
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("RANK", "0")
    assert main(["inspect", str(tmp_path)]) == 2
