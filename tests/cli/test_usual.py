"""The shortest command: where its results go, its recipe and format, and what it closes with."""

from __future__ import annotations

from pathlib import Path

import pytest

from lrquant.cli import main, quantize_main
from lrquant.cli.usual import RECIPE, with_usual_places, with_usual_recipe
from lrquant.config.config import Config, preset
from lrquant.errors import LRQuantError
from lrquant.files.manifest import read_manifest
from lrquant.runs.folder import RunFolder

TOWER = "m-W4A4-vision-W8A8"


@pytest.fixture
def shortest(model_folder, data_dir, tmp_path, monkeypatch):
    """A command line that names a model and little else, in an empty folder."""
    model_folder("llama").rename(tmp_path / "tiny")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    few = ["--nsamples", "2", "--seqlen", "16", "--epochs", "1", "--precision", "float32"]

    def words(*more):
        own = ["--model", str(tmp_path / "tiny"), "--data_dir", data_dir, *few, "--no-report"]
        return ["quantize", *own, *map(str, more)]

    return words


def lines_of(text: str) -> dict[str, str]:
    """The closing lines by the words that begin them."""
    pairs = (line.partition(":") for line in text.splitlines())
    return {name: rest.strip() for name, colon, rest in pairs if colon}


def test_it_ends_with_a_checkpoint_named_after_model_and_scheme(shortest, capsys):
    assert main(shortest("--scheme", "W4A16g16", "--ppl", "wikitext2", "--compare")) == 0
    told = lines_of(capsys.readouterr().out)
    assert sorted(path.name for path in Path().iterdir() if path.is_dir()) == [
        "tiny-W4A16g16",
        "tiny-W4A16g16-run",
    ]
    assert read_manifest(Path("tiny-W4A16g16"))["format"] == "compressed-tensors"
    assert told["checkpoint"] == "tiny-W4A16g16 (compressed-tensors, W4A16g16)"
    assert "in bfloat16 -> " in told["size"] and "bits a weight" in told["size"]
    assert "full precision " in told["quality"] and "round-to-nearest " in told["quality"]
    assert told["run folder"] == "tiny-W4A16g16-run" and told["time"].endswith(" s")
    assert told["next"] == "lrquant chat tiny-W4A16g16"


def test_what_is_there_stays_and_a_restart_is_one_command(shortest, capsys):
    words = shortest("--scheme", "W4A16", "--resume", "auto")
    assert main(words) == 0
    first = capsys.readouterr().out
    assert "block 1: loss" in first and "resuming" not in first
    before = {path: path.read_bytes() for path in Path("tiny-W4A16").iterdir()}
    blocks = sorted(Path("tiny-W4A16-run", "blocks").iterdir())
    blocks[1].unlink()
    assert main(words[:-2]) == 2
    assert "go on with --resume" in capsys.readouterr().err
    assert main(words) == 0
    assert "resuming after block 1 of 2" in capsys.readouterr().out
    assert main(words) == 0
    again = capsys.readouterr().out
    assert "block 1: loss" not in again and "checkpoint: tiny-W4A16 " in again
    assert {path: path.read_bytes() for path in Path("tiny-W4A16").iterdir()} == before


def test_a_checkpoint_of_another_run_is_not_taken_for_its_own(shortest, capsys):
    assert main(shortest("--scheme", "W4A16")) == 0
    named = ["--scheme", "W3A16", "--output_dir", "other", "--save_dir", "tiny-W4A16"]
    assert main(shortest(*named, "--resume", "auto")) == 2
    assert "holds a checkpoint" in capsys.readouterr().err


def test_what_no_served_format_holds_is_native_and_said(shortest, capsys):
    assert main(shortest("--scheme", "W4A4")) == 0
    out = capsys.readouterr().out
    assert "written in the native format" in out and "--scheme W4A4-sym-qkv16" in out
    assert read_manifest(Path("tiny-W4A4"))["format"] == "lrquant"
    assert "vllm serve" not in out


def test_a_run_alone(shortest, capsys):
    assert main(shortest("--scheme", "W4A16", "--no-save", "--quiet")) == 0
    out = capsys.readouterr().out
    assert not Path("tiny-W4A16").exists() and Path("tiny-W4A16-run", "run.json").is_file()
    assert "lrquant export tiny-W4A16-run DIR" in out and "block 0" not in out
    assert "not measured; learning took " in out


def test_the_usual_recipe_and_what_stands_in_its_place(shortest):
    assert main(shortest("--scheme", "W4A16", "--no-save")) == 0
    config = RunFolder.open(Path("tiny-W4A16-run")).config
    assert (config.preset, config.lr_plus, config.rounding, config.epochs) == (
        RECIPE,
        True,
        True,
        1,
    )
    assert with_usual_recipe({"model": "m"})["preset"] == RECIPE
    for named in ({"lwc": True}, {"preset": "paper"}, {"lr_plus": False}, {"epochs": 0}):
        assert with_usual_recipe(named) == named
    assert preset("fast")["epochs"] == 5 and "tune" not in preset("fast")
    again = with_usual_recipe(Config.from_yaml(Path("tiny-W4A16-run/config.yaml")).__dict__)
    assert again["preset"] == RECIPE


@pytest.mark.parametrize(
    ("settings", "places"),
    [
        ({"model": "org/big", "scheme": "W8A8"}, ("big-W8A8-run", "big-W8A8", "auto")),
        ({"model": "m/x.gguf"}, ("x-W4A4-run", "x-W4A4", "auto")),
        ({"model": "m", "net": "n", "wbits": 3, "abits": 16}, ("n-W3A16-run", "n-W3A16", "auto")),
        ({"model": "m", "format": "awq"}, ("m-W4A4-run", "m-W4A4", "awq")),
        ({"model": "m", "target": "vllm"}, ("m-W4A4-run", "m-W4A4", None)),
        ({"model": "m", "scheme_for": ("a=W8A16",)}, ("m-W4A4-mixed-run", "m-W4A4-mixed", "auto")),
        ({"model": "m", "vision_scheme": "W8A8"}, (f"{TOWER}-run", TOWER, "auto")),
        ({"model": "m", "save_dir": "there/"}, ("there-run", "there/", None)),
        ({"model": "m", "scheme": "W16A16"}, ("m-W16A16-run", None, None)),
        ({"model": "m", "output_dir": "o"}, ("o", None, None)),
        ({"model": "m", "resume": "r"}, (None, None, None)),
        ({"scheme": "W4A4"}, (None, None, None)),
    ],
    ids=str,
)
def test_places(settings, places):
    told = with_usual_places(settings, save=True)
    assert (told.get("output_dir"), told.get("save_dir"), told.get("format")) == places
    assert told.items() >= settings.items()


def test_no_save_and_a_place_to_save_contradict_each_other():
    with pytest.raises(LRQuantError, match="--no-save with --save_dir here"):
        with_usual_places({"model": "m", "save_dir": "here"}, save=False)


def test_the_published_command_line_has_its_own_places_and_method(shortest, capsys, monkeypatch):
    Path("LRLLM").mkdir()
    monkeypatch.chdir("LRLLM")
    assert quantize_main(shortest("--wbits", 4, "--abits", 16)[1:]) == 0
    assert "method LRQuant: weight clipping" in capsys.readouterr().out
    assert not list(Path().iterdir()) and Path("../log/run.json").is_file()


def test_the_help_has_what_matters_first(capsys):
    told = {}
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            main(["quantize", flag])
        told[flag] = capsys.readouterr().out
    assert "--scheme WxAy" in told["--help"] and "--recipe default|fast|" in told["--help"]
    assert "--rotate-rank" not in told["--help"] and "--rotate-rank N" in told["--help-all"]
    assert len(told["--help"].splitlines()) < 70 and "more settings: lrquant" in told["--help"]
    for name in vars(Config()):
        flag = "--" + {"preset": "recipe"}.get(name, name).replace("_", "-")
        assert f" {flag}" in told["--help-all"], name
        assert f"{flag} {name.upper()}" not in told["--help-all"], "a metavar that repeats the flag"


def test_verbose_says_the_time_and_where_an_error_came_from(shortest, capsys):
    assert main(shortest("--scheme", "W4A16", "--no-save", "--verbose")) == 0
    assert capsys.readouterr().out[2] == ":"
    assert main(["inspect", "nothing", "--verbose"]) == 2
    assert "Traceback" in capsys.readouterr().err
