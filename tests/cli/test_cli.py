"""The command line: the published lines, every flag, and one clear line for every wrong input."""

from __future__ import annotations

import dataclasses
import errno
import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lrquant.cli import commands as cli
from lrquant.cli import main, quantize_main, statistics_main
from lrquant.config.config import Config
from lrquant.runs.folder import RunFolder

SCRIPTS = Path(__file__).parents[2] / "LRLLM"
QUICK = ["--seqlen", "16", "--precision", "float32"]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name in ("wikitext2", "ptb", "c4"):
        (folder / name).mkdir()
        for split in ("validation", "test"):
            text = " ".join(f"{name} {split} {number * number}" for number in range(60))
            (folder / name / f"{split}.txt").write_text(text)
    return folder


@pytest.fixture
def quick(data_dir):
    """Flags of a run that takes a moment."""
    few = ["--nsamples", "3", "--epochs", "1", "--no-report", "--recipe", "default"]
    return [*QUICK, "--data_dir", str(data_dir), *few]


@pytest.fixture
def command(model_folder, quick, tmp_path):
    """A whole command line that works, with what else is given put last."""

    def arguments(*more):
        model = ["--model", str(model_folder("llama"))]
        return ["quantize", *model, *quick, "--output_dir", str(tmp_path / "run"), *map(str, more)]

    return arguments


@pytest.fixture
def succeed(capsys):
    """Run a command that must work; its standard output."""

    def run(arguments, entry=main):
        code = entry(list(map(str, arguments)))
        streams = capsys.readouterr()
        assert code == 0, streams.err
        return streams.out

    return run


@pytest.fixture
def refuse(capsys):
    """Run a command that must fail with exit code 2 and one line that has these parts."""

    def run(arguments, *parts, entry=main):
        capsys.readouterr()
        code = entry(list(map(str, arguments)))
        error = capsys.readouterr().err
        lines = error.splitlines()
        assert code == 2
        assert len(lines) == 1 and lines[0].startswith("lrquant: "), error
        for part in parts:
            assert str(part) in lines[0]

    return run


def learned_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder, "blocks").iterdir())}


def learned_values(folder):
    """The tensors' bytes alone: a file's header says of which run it is."""
    return {
        name: content[8 + int.from_bytes(content[:8], "little") :]
        for name, content in learned_bytes(folder).items()
    }


def no_run(folder):
    """Nothing there that a later run would take for one."""
    return not (folder / "run.json").exists() and not list(folder.glob("blocks/*"))


# The published command lines


def test_the_published_command_lines(model_folder, data_dir, tmp_path, capsys):
    """As they stand, in a copy of LRLLM/; a second process writes the same bytes as this one."""
    work = Path(shutil.copytree(SCRIPTS, tmp_path / "LRLLM"))
    model = model_folder("opt")
    own = [*QUICK, "--nsamples", "3", "--data_dir", str(data_dir)]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}

    def script(line, *more):
        name, *flags = line.replace("MODEL", str(model)).split()
        done = subprocess.run(
            [sys.executable, name, *flags, *own, *more],
            **{"cwd": work, "env": os.environ | threads, "capture_output": True, "text": True},
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    script("generate_act_scale_shift.py --model MODEL")
    name = f"{model.name}.pt"
    assert {path.name for path in work.glob("act_s*/*")} == {name}
    out = script(
        "main.py --model MODEL --epochs 1 --output_dir ./log/x-w4a4 --eval_ppl --wbits 4 --abits 4 "
        "--lwc --let",
        *("--limit", "2", "--no-report"),
    )
    assert out.startswith("scheme W4A4: ")
    assert f"statistics act_scales/{name}, act_shifts/{name}" in out
    for text in ("wikitext2", "ptb", "c4", "ptb-new", "c4-new"):
        assert f"{text} perplexity, quantized: " in out
    assert Config.from_yaml(work / "log/x-w4a4/config.yaml").act_scales == f"act_scales/{name}"

    line = ["--epochs", "1", "--scheme", "W4A4", "--lwc", "--let", *own, "--model", str(model)]
    line += ["--no-report", "--output_dir", str(tmp_path / "on the way")]
    assert main(["quantize", *line]) == 0
    assert learned_values(work / "log/x-w4a4") == learned_values(tmp_path / "on the way")
    assert "statistics" not in capsys.readouterr().out


def test_the_published_weight_only_line(command, succeed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = command("--eval_ppl", "--limit", 1, "--wbits", 4, "--abits", 16, "--lwc")
    out = succeed(line[1:], entry=quantize_main)
    assert out.startswith("scheme W4A16: weights 4 bits, asymmetric, per output channel")
    assert "method LRQuant: weight clipping" in out and "transformation" not in out.splitlines()[1]
    assert "| wikitext2" in out


@pytest.mark.parametrize("line", ["--wbits 4 --abits 4 --lwc --let", "--wbits 4 --abits 16 --lwc"])
def test_the_published_lines_of_lrquant_plus(command, succeed, tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    arguments = command("--eval_ppl", "--limit", 1, *line.split(), "--lr_plus")
    out = succeed(arguments[1:], entry=quantize_main)
    assert "method LRQuant+: weight clipping" in out and "two branches, dynamic weights" in out
    assert "| LRQuant+ |" in out and "| wikitext2" in out
    out = succeed(
        [*arguments[1:], "--preset", "paper", "--epochs", 1, "--overwrite"], entry=quantize_main
    )
    assert "dense on the weight" in out and "dynamic weights from one" in out


def test_weight_only_by_mistake_is_said(command, succeed):
    """The published W4A16 line passes --abits 4."""
    assert succeed(command("--wbits", 4, "--abits", 4, "--lwc")).startswith("scheme W4A4: ")


def test_statistics_of_the_published_place_are_used_where_they_are(
    model_folder, quick, data_dir, succeed, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    model = ["--model", model_folder("opt"), "--data-dir", data_dir, *QUICK]
    out = succeed([*model, "--num-samples", "3", "--net", "tiny"], entry=statistics_main)
    assert "act_scales/tiny.pt" in out
    maxima = torch.load("act_scales/tiny.pt", weights_only=True)
    assert len(maxima) == 2 * 6 and set(maxima) == set(torch.load("act_shifts/tiny.pt"))
    run = [*model, *quick, "--let", "--net", "tiny", "--output-dir", "run", "--overwrite"]
    used = "statistics act_scales/tiny.pt, act_shifts/tiny.pt"
    assert used in succeed(run, entry=quantize_main)
    assert used not in succeed(["quantize", *run])
    assert "statistics" not in succeed([*run, "--net", "other"], entry=quantize_main)
    assert "statistics" not in succeed([*run, "--lwc", "--no-let"], entry=quantize_main)
    assert used in succeed([*run, "--act-scales", "act_scales/tiny.pt"], entry=quantize_main)


# Flags


def flags_of(name):
    return {f"--{name}", "--" + name.replace("_", "-")}


@pytest.mark.parametrize("entry", dataclasses.fields(Config), ids=lambda entry: entry.name)
def test_every_setting_is_a_flag_with_underscores_or_dashes(entry, monkeypatch):
    seen = {}
    monkeypatch.setattr("lrquant.pipeline.run", lambda settings, progress: seen.update(settings))
    monkeypatch.setattr(cli, "with_usual_recipe", lambda settings: settings)
    monkeypatch.setattr(cli, "with_usual_places", lambda settings, save: settings)
    given = {
        **{"bool": [], "bool | None": [], "let_shift": ["never"], "loss": ["nlc"]},
        **{"precision": ["float32"], "offload": ["disk"], "compile": ["off"]},
    }
    kind = entry.type.__name__ if isinstance(entry.type, type) else str(entry.type)
    value = given.get(entry.name, given.get(kind, ["3"]))
    results = []
    for flag in flags_of(entry.name):
        seen.clear()
        with pytest.raises(AttributeError):  # the stand-in returns nothing to print
            main(["quantize", flag, *value])
        results.append(dict(seen))
        if value:
            with pytest.raises(AttributeError):
                main(["quantize", f"{flag}={value[0]}"])
            assert seen == results[-1]
    assert entry.name in results[0] and results[0] == results[-1]
    assert len(results[0]) == (2 if entry.name == "resume" else 1)


def test_flags_that_are_on_can_be_switched_off(command, succeed):
    out = succeed(command("--lwc", "--let", "--no-let"))
    assert "equivalent transformation" not in out


def test_values_keep_their_underscores(model_folder, quick, succeed, tmp_path):
    model = model_folder("llama").rename(tmp_path / "my_tiny_model")
    succeed(["quantize", f"--model={model}", *quick, "--output_dir", tmp_path / "a_run"])
    assert Config.from_yaml(tmp_path / "a_run" / "config.yaml").net == "my_tiny_model"


def test_the_scheme_in_short(command, succeed, tmp_path):
    assert succeed(command("--scheme", "w3a16g16")).startswith("scheme W3A16g16: ")
    assert RunFolder.open(tmp_path / "run").identity["scheme"]["group_size"] == 16


def test_a_configuration_file_repeats_a_run(command, succeed, tmp_path):
    succeed(command("--scheme", "W4A4", "--let_lr", "2e-3", "--let-sites", "norm"))
    first = RunFolder.open(tmp_path / "run")
    again = ["--config", tmp_path / "run" / "config.yaml", "--output_dir", tmp_path / "again"]
    succeed(["quantize", *again])
    second = RunFolder.open(tmp_path / "again")
    assert second.config == dataclasses.replace(first.config, output_dir=str(tmp_path / "again"))
    assert learned_bytes(second.path) == learned_bytes(first.path)
    again.append("--overwrite")
    out = succeed(["quantize", *again, "--wbits", "3"])
    assert out.startswith("scheme W3A4: ")
    out = succeed(["quantize", *again, "--scheme", "W8A8"])
    assert out.startswith("scheme W8A8: ")


def test_the_seed_decides(command, succeed, tmp_path):
    runs = []
    for seed in (2, 2, 3):
        succeed(command("--seed", seed, "--overwrite"))
        runs.append(learned_values(tmp_path / "run"))
    assert runs[0] == runs[1] != runs[2]


def test_version_and_help(capsys):
    for arguments in (["--version"], ["--help"], ["quantize", "--help"], ["stats", "-h"]):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 0
    assert importlib.metadata.version("lrquant") in capsys.readouterr().out


def test_scripts_are_a_few_lines():
    assert all(len(path.read_text().splitlines()) < 10 for path in SCRIPTS.glob("*.py"))


# Going on


def stopped_after_one_block(command, monkeypatch, *more):
    save = RunFolder.save_block

    def saving(self, parameters, record):
        save(self, parameters, record)
        raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "save_block", saving)
    assert main(command(*more)) == 130
    monkeypatch.setattr(RunFolder, "save_block", save)


def test_an_interrupted_run_says_how_to_go_on_and_does(
    command, succeed, capsys, tmp_path, monkeypatch
):
    stopped_after_one_block(command, monkeypatch)
    assert capsys.readouterr().err.splitlines()[-1] == (
        "lrquant: interrupted; finished blocks are kept, go on with --resume"
    )
    stopped = shutil.copytree(tmp_path / "run", tmp_path / "stopped")
    assert "resuming after block 1 of 2" in succeed(command("--resume"))
    resumed = learned_bytes(tmp_path / "run")
    refused = "holds a run of 2 learned blocks; go on with --resume, replace it with --overwrite"
    assert main([str(argument) for argument in command()]) == 2
    assert refused in capsys.readouterr().err
    assert resumed == learned_bytes(tmp_path / "run")
    succeed(command("--overwrite"))
    assert resumed == learned_bytes(tmp_path / "run")
    succeed(command("--resume", stopped, "--output_dir", tmp_path / "other"))
    assert learned_bytes(tmp_path / "other") == resumed and len(learned_bytes(stopped)) == 1
    given = command("--resume", stopped)
    place = given.index("--output_dir")
    succeed([*given[:place], *given[place + 2 :]])
    assert learned_bytes(stopped) == resumed


def test_resume_takes_the_present_folder_too(command, succeed, tmp_path, monkeypatch):
    stopped_after_one_block(command, monkeypatch)
    monkeypatch.chdir(tmp_path / "run")
    given = command("--resume", ".")
    place = given.index("--output_dir")
    assert "resuming after block 1" in succeed([*given[:place], *given[place + 2 :]])


def test_another_run_is_refused(command, succeed, refuse, model_folder, make_model, tmp_path):
    succeed(command())
    before = learned_bytes(tmp_path / "run")
    (tmp_path / "text.txt").write_text("another text " * 100)
    changes = {
        "scheme weight_bits differs: the run has 4, this command 3": ["--wbits", 3],
        "method let_lr differs: the run has 0.005, this command 0.1": ["--let_lr", 0.1],
        "learning epochs differs": ["--epochs", 2],
        "calibration differs: the run has 'wikitext2/validation": [
            *("--calib_dataset", tmp_path / "text.txt")
        ],
        "seed 2', this command": ["--seed", 5],
        "model model_type differs: the run has 'llama', this command 'opt'": [
            *("--model", model_folder("opt"))
        ],
    }
    for said, flags in changes.items():
        refuse(command(*flags, "--resume"), said, tmp_path / "run", "--output_dir")
    make_model("llama", num_hidden_layers=3).save_pretrained(tmp_path / "model-llama")
    given = ["quantize", "--config", tmp_path / "run" / "config.yaml", "--resume"]
    refuse(given, "model blocks differs: the run has 2, this command 3")
    assert learned_bytes(tmp_path / "run") == before


@pytest.mark.parametrize("index", [0, 1])
def test_a_damaged_block_is_told_of_in_one_way(command, succeed, refuse, tmp_path, index):
    succeed(command())
    run = tmp_path / "run"
    path = run / "blocks" / f"{index:04d}.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    said = (
        f"{path}: changed or damaged since it was written; restore it, or delete it and go on with "
        "--resume, which learns it again"
    )
    export = ["export", run, tmp_path / "saved", "--format", "dequantized"]
    for given in (
        *(["evaluate", run], export, ["report", run]),
        *(command("--resume"), command("--resume", run, "--output_dir", tmp_path / "other")),
    ):
        refuse(given, said)
    assert not (tmp_path / "saved").exists()
    path.unlink()
    succeed(command("--resume"))
    assert path.read_bytes() == content


def test_no_run_and_a_newer_run(command, succeed, refuse, tmp_path):
    refuse(command("--resume"), tmp_path / "run", "no run here")
    assert no_run(tmp_path / "run")
    succeed(command())
    path = tmp_path / "run" / "run.json"
    path.write_text(path.read_text().replace('"format": 4', '"format": 5'))
    newer = "format 5, this version reads format 4"
    refuse(command("--resume"), tmp_path / "run", newer)
    refuse(["inspect", tmp_path / "run"], newer)
    refuse(["evaluate", tmp_path / "run"], newer)
    refuse(["quantize", "--epochs", 0, "--resume", tmp_path / "run"], newer)


# Measuring and inspecting


def test_evaluating_a_run_and_a_model(command, succeed, refuse, data_dir, tmp_path, monkeypatch):
    stopped_after_one_block(command, monkeypatch)
    unfinished = "1 of 2 blocks are finished; go on with --resume"
    refuse(["evaluate", tmp_path / "run", "--ppl", "ptb"], unfinished)
    refuse(["quantize", "--epochs", 0, "--resume", tmp_path / "run"], unfinished)
    succeed(command("--resume"))
    measured = ["--ppl", "wikitext2", "--limit", "2"]
    once = succeed(["evaluate", tmp_path / "run", *measured])
    again = succeed(["quantize", "--epochs", "0", "--resume", tmp_path / "run", *measured])
    (row,) = (line for line in once.splitlines() if line.startswith("| wikitext2"))
    assert row in again and f"run folder: {tmp_path / 'run'}" in again
    both = succeed(["evaluate", tmp_path / "run", *measured, "--compare"])
    assert "full precision | round-to-nearest | LRQuant |" in both
    model = tmp_path / "model-llama"
    plain = succeed(["evaluate", model, *measured, *QUICK, "--data-dir", data_dir])
    score = plain.splitlines()[-1].split("|")[2].strip()
    assert score in both and "| full precision |" in plain


def test_inspecting(command, succeed, refuse, tmp_path, monkeypatch):
    stopped_after_one_block(command, monkeypatch, "--wbits", 3)
    out = succeed(["inspect", tmp_path / "run"])
    assert "1 of 2 blocks, not finished; go on with --resume" in out
    succeed(command("--wbits", 3, "--resume", "--ppl", "c4", "--limit", 2))
    out = succeed(["inspect", tmp_path / "run"])
    records = RunFolder.open(tmp_path / "run").records()
    assert "2 of 2 blocks, finished" in out and "scheme: W3A4: weights 3 bits" in out
    assert "wikitext2/validation" in out and "seed 2" in out and "float32" in out
    assert "let_sites norm+value_output+up_down" in out and "epochs 1" in out
    for record in records:
        assert f"{record.initial_loss:.6g}" in out and f"{record.final_loss:.6g}" in out
    size = sum(path.stat().st_size for path in (tmp_path / "run" / "blocks").iterdir())
    assert f"learned parameters: {size / 1000:.1f} kB" in out
    assert "perplexity, W3A4" in out and "| c4" in out


def test_inspecting_checkpoints(command, succeed, refuse, tmp_path):
    succeed(command("--scheme", "W4A16", "--save_dir", tmp_path / "saved"))
    out = succeed(["inspect", tmp_path / "saved"])
    assert "llama, 3 files" in out and "scheme: W4A16: " in out
    out = succeed(["inspect", tmp_path / "model-llama"])
    assert "llama, 1 files" in out and "none (dense weights)" in out
    refuse(["inspect", tmp_path], tmp_path, "neither a run folder")
    refuse(["inspect", tmp_path / "absent"], "absent: no such folder")
    for folder, name in (("saved", "config.json"), ("run", "run.json"), ("run", "results.json")):
        kept = (tmp_path / folder / name).read_bytes()
        (tmp_path / folder / name).write_text("{ nonsense")
        refuse(["inspect", tmp_path / folder], name)
        (tmp_path / folder / name).write_bytes(kept)


# Wrong input: one line, exit code 2, nothing left that looks like a run


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--model", "/no/such/model"], ["/no/such/model: no such folder"]),
        (["--model", ""], ["--model", "empty"]),
        (["--wbits", 0], ["weight bits 0: use 2 to 8, or 16"]),
        (["--wbits", 1], ["weight bits 1: use 2 to 8, or 16"]),
        (["--abits", 9], ["activation bits 9: use 2 to 8, or 16"]),
        (["--qkv_bits", 15], ["Q/K/V bits 15: use 2 to 8, or 16"]),
        (["--group_size", 5], ["group size 5 does not divide the 32", "q_proj", "16, 32"]),
        (["--group_size", 0], ["group size 0: use a positive number"]),
        (["--wbits", 16, "--abits", 16, "--let"], ["--let with W16A16", "no effect"]),
        (["--wbits", 16, "--lwc"], ["--lwc with --wbits 16"]),
        (["--scheme", "W4"], ["scheme 'W4'", "for example W4A4"]),
        (["--scheme", "int4"], ["scheme 'int4'", "the nearest is W4A16"]),
        (["--scheme", "W4A4", "--wbits", 3], ["scheme W4A4 and wbits 3 disagree"]),
        (["--device", "tpu"], ["device 'tpu'", "use auto, cpu, cuda"]),
        (["--epochs", "x"], ["--epochs: expected a whole number, got 'x'"]),
        (["--epochs", -1], ["epochs -1: use a whole number from 0"]),
        (["--lwc_lr", "fast"], ["--lwc-lr: expected a number, got 'fast'"]),
        (["--let_lr", "nan"], ["let_lr nan: use a number from 0"]),
        (["--loss", "mae"], ["loss 'mae': use one of mse, nlc, or several joined by +"]),
        (["--let_sites", "norm,head"], ["let_sites 'head': use some of norm"]),
        (["--seqlen", 1], ["seqlen 1: use a whole number from 2"]),
        (["--seqlen", 5000], ["wikitext2/validation", "fewer than one window of seqlen 5000"]),
        (["--calib_dataset", "novels"], ["unknown data set 'novels'", "known are wikitext2"]),
        (["--calib_dataset", "/no/such.txt"], ["/no/such.txt: no such file"]),
        (
            ["--calib_dataset", "wikitxt2"],
            ["unknown data set 'wikitxt2'; the nearest is wikitext2"],
        ),
        (["--scheme", "W4A16g12B"], ["the nearest is W4A16g128"]),
        (["--recipe", "blanced"], ["preset 'blanced': use one of", "the nearest is balanced"]),
        (["--data_dir", "/no/such/folder"], ["data_dir /no/such/folder: no such folder"]),
        (["--let", "--act-scales", "/no/such.pt"], ["/no/such.pt: no such file"]),
        (["--act-scales", "/no/such.pt", "--lwc"], ["/no/such.pt"]),
        (["--config", "/no/such.yaml"], ["/no/such.yaml"]),
        (["--ppl", "novels"], ["unknown data set 'novels'"]),
        (["--nonsense"], ["unrecognized arguments: --nonsense; see lrquant quantize --help-all"]),
        (["--shceme", "W4A4"], ["unrecognized arguments: --shceme; the nearest is --scheme"]),
        (["--no-save", "--save_dir", "here"], ["--no-save with --save_dir here: give one"]),
        (["--lwc=yes"], ["--lwc"]),
        (["--wbits"], ["--wbits: expected one argument"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if str(value[0]).startswith("--") else "",
)
def test_wrong_flags(command, refuse, tmp_path, flags, parts):
    refuse(command(*flags), *parts)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ["--calib_dataset", "--ppl", "--agreement"])
def test_a_mistyped_text_is_told_before_the_model_is_opened(command, refuse, monkeypatch, flag):
    def opened(*_):
        raise AssertionError("the model was opened")

    monkeypatch.setattr("lrquant.preflight.requirements.load_model", opened)
    refuse(command(flag, "wikitxt2"), "the nearest is wikitext2")
    monkeypatch.setattr("lrquant.measures.subjects.subject.load_model", opened)
    target = command()[command().index("--model") + 1]
    if flag == "--ppl":
        refuse(["evaluate", target, flag, "wikitxt2"], "the nearest is wikitext2")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["COMMAND"]),
        (["improve"], ["improve: no such command; see lrquant --help"]),
        (["quantise"], ["quantise: no such command; the nearest is quantize"]),
        (["evaluate"], ["TARGET"]),
        (["stats"], ["no model given"]),
        (["evaluate", "/no/such/model"], ["/no/such/model"]),
    ],
    ids=str,
)
def test_wrong_commands(refuse, arguments, parts):
    refuse(arguments, *parts)


def test_an_unknown_setting_in_a_file(command, refuse, tmp_path):
    path = tmp_path / "mine.yaml"
    for content, said in (("wbit: 4", "'wbit'"), ("epochs: x", "'x'"), ("[", "cannot be read")):
        path.write_text(content)
        refuse(command("--config", path), path, said)
    path.write_text(yaml.safe_dump({"scheme": "W4A4", "wbits": 3}))
    refuse(command("--config", path), "scheme W4A4 and wbits 3 disagree")
    assert not (tmp_path / "run").exists()


def test_a_half_downloaded_model(command, refuse, tmp_path):
    given = command()
    weights = tmp_path / "model-llama" / "model.safetensors"
    content = weights.read_bytes()
    for damaged in (content[:-100], content[: len(content) // 2], b"", content[:4]):
        weights.write_bytes(damaged)
        refuse(given, weights, "download it again")
    weights.unlink()
    refuse(given, tmp_path / "model-llama", "no weights")
    (tmp_path / "model-llama" / "config.json").write_text('{"model_type": "llama"')
    refuse(given, "model-llama")
    assert not (tmp_path / "run").exists()


def test_damaged_statistics(command, succeed, refuse, tmp_path):
    path = tmp_path / "scales.pt"
    given = command("--let", "--act-scales", path)
    contents = [b"", b"not a statistics file", b"PK\x03\x04 cut off"]
    torch.save({"model.layers.0.self_attn.q_proj": torch.ones(32)}, path)
    contents.append(path.read_bytes()[:-40])
    for content in contents:
        path.write_bytes(content)
        refuse(given, path, "corrupt or not a statistics file")
    torch.save([torch.ones(32)], path)
    refuse(given, path, "expected a mapping")
    torch.save({"x": torch.tensor([float("nan")])}, path)
    refuse(given, path, "not finite")
    assert not (tmp_path / "run").exists()
    torch.save({"model.layers.0.other": torch.ones(32)}, path)
    refuse(given, "model.layers.0.self_attn.q_proj", "another model")
    torch.save({"model.layers.0.self_attn.q_proj": torch.ones(8)}, path)
    refuse(given, "has 8 channels, this model has 32")


def test_a_file_in_the_place_of_a_folder(command, refuse, quick, data_dir, tmp_path):
    place = tmp_path / "file"
    place.write_text("mine")
    refuse(command("--output_dir", place), place, "--output_dir")
    refuse(command("--output_dir", place / "deeper"), place, "--output_dir")
    refuse(command("--save_dir", place), place, "--save_dir")
    model = ["--model", tmp_path / "model-llama", *QUICK, "--data_dir", data_dir, "--nsamples", 2]
    refuse(["stats", *model, "--scales-output-path", place], place)
    assert place.read_text() == "mine" and not (tmp_path / "run").exists()


def full_at(name, monkeypatch):
    replace = os.replace

    def full(source, target):
        if str(target).endswith(name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)


def test_no_space_left_for_a_block(command, succeed, refuse, tmp_path, monkeypatch):
    full_at("blocks/0001.safetensors", monkeypatch)
    refuse(command(), tmp_path / "run", "blocks/0001", "No space left", "--resume")
    assert RunFolder.open(tmp_path / "run").finished_blocks() == 1
    assert [path.name for path in (tmp_path / "run" / "blocks").iterdir()] == ["0000.safetensors"]
    monkeypatch.undo()
    assert "resuming after block 1 of 2" in succeed(command("--resume"))


@pytest.mark.parametrize("name", ["run.json", "config.yaml", "blocks.jsonl", "results.json"])
def test_no_space_left_for_a_small_file(command, refuse, tmp_path, monkeypatch, name):
    full_at(name, monkeypatch)
    refuse(command(), tmp_path / "run", "No space left")
    assert not (tmp_path / "run" / name).exists()
    if name in ("run.json", "config.yaml"):
        assert no_run(tmp_path / "run")


def test_a_weight_that_is_not_finite(command, refuse, make_model, tmp_path):
    given = command()
    model = make_model("llama")
    model.model.layers[1].mlp.gate_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "model-llama")
    refuse(given, "block 1: mlp.gate_proj.weight holds a value that is not finite")


def test_a_model_of_an_unknown_family(command, refuse, tmp_path):
    given = command()
    path = tmp_path / "model-llama" / "config.json"
    path.write_text(path.read_text().replace('"llama"', '"gpt2"'))
    refuse(given, "'gpt2'", "nearest that is declared", "docs/add-an-architecture.md")


def test_errors_of_the_operating_system_are_one_line_too(refuse, monkeypatch):
    for error, said in (
        (OSError(errno.EACCES, "Permission denied", "/there"), "Permission denied: /there"),
        (OSError(errno.ENOSPC, "No space left on device"), "lrquant: No space left on device"),
        (ConnectionError("no network"), "no network"),
    ):

        def fail(*arguments, error=error):
            raise error

        monkeypatch.setattr(cli, "_inspect", fail)
        refuse(["inspect", "/somewhere"], said)
