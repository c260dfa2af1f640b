"""lrquant check: every refusal is found, all at once, before anything is learned or written."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import shutil

import pytest

from lrquant import LRQuantError, evaluate, quantize
from lrquant.blocks import placement
from lrquant.cli import main
from lrquant.config.config import Config
from lrquant.model.sources.skeleton import SkeletonSource
from lrquant.preflight import checks, places
from lrquant.preflight.checks import preflight as check
from lrquant.preflight.estimate import Memory
from lrquant.preflight.findings import Preflight
from lrquant.reports.preflight import preflight_text, preflight_values
from lrquant.runs.folder import RunFolder

FREE = collections.namedtuple("Free", "available")
SPACE = collections.namedtuple("Space", "total used free")
WHATS = ["format", "model", "groups", "device", "calibration", "output_dir", "disk", "memory"]


@pytest.fixture
def data_dir(tmp_path):
    folder = tmp_path / "data" / "wikitext2"
    folder.mkdir(parents=True)
    for split in ("validation", "test"):
        (folder / f"{split}.txt").write_text("some words, and some more of them. " * 20)
    return folder.parent


@pytest.fixture
def settings(model_folder, data_dir, tmp_path):
    """Settings of a run that would work."""
    return {
        **{"model": str(model_folder("llama")), "scheme": "W4A16g16", "precision": "float32"},
        **{"data_dir": str(data_dir), "nsamples": 2, "seqlen": 16, "epochs": 1},
        "output_dir": str(tmp_path / "runs" / "run"),
    }


def found(done, state):
    return [(finding.what, finding.text) for finding in done.findings if finding.state == state]


def tree(folder):
    return sorted(str(path) for path in folder.rglob("*"))


def test_a_run_that_works(settings, tmp_path):
    before = tree(tmp_path)
    asked = {"target": "transformers", "save_dir": str(tmp_path / "saved"), "ppl": ("wikitext2",)}
    done = check({**settings, **asked})
    assert not done.failed
    whats = [finding.what for finding in done.findings]
    assert {*WHATS, "packing", "evaluation", "save_dir", "fused"} <= set(whats)
    ((what, warned),) = found(done, "warning")
    assert what == "runtime" and "save_pretrained writes a dense model" in warned
    assert ("runtime", "transformers computes what was learned") in found(done, "ok")
    assert tree(tmp_path) == before, "nothing is written"
    assert done.memory.peak > done.stream_bytes == 2 * 2 * 16 * 32 * 4
    assert done.run_bytes > 0 and done.checkpoint.total > 0
    assert done.seconds.learning > 0 and done.seconds.measuring > 0
    done = quantize(**settings, **asked, report=False)
    assert done.results["perplexity"], "and it does work"


def test_a_text_that_is_learned_from_says_little_when_it_is_measured(settings, data_dir, caplog):
    """A file that is both, and a set without a train split whose measured one is learned from."""
    (data_dir / "c4").mkdir()
    words = (data_dir / "wikitext2" / "test.txt").read_text()
    for place in (data_dir / "c4" / "validation.txt", data_dir / "own.txt"):
        place.write_text(words)
    own, texts = str(data_dir / "own.txt"), ("wikitext2", "c4")
    for asked, told in (
        ({"calib_dataset": "wikitext2", "ppl": texts}, []),
        ({"calib_dataset": "wikitext2,c4", "agreement": texts}, ["c4"]),
        ({"calib_dataset": str(data_dir / "c4" / "validation.txt"), "ppl": texts}, ["c4"]),
        ({"calib_dataset": own, "ppl": (own, "wikitext2")}, [own]),
    ):
        warned = found(check({**settings, **asked}), "warning")
        assert [text.partition(":")[0] for what, text in warned if what == "calibration"] == told
    quantize(**settings, **asked, report=False)
    (warning,) = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert warning.startswith(f"{own}: measured on text that is learned from, so it ")


def test_a_finished_run_tells_of_the_text_that_it_was_learned_from(
    settings, data_dir, monkeypatch, caplog
):
    """By whichever path; a run of before, which does not say, is measured as it was."""
    own, part = data_dir / "own.txt", data_dir / "part.txt"
    for place in (own, part):
        place.write_text((data_dir / "wikitext2" / "test.txt").read_text())
    learned = {"calib_dataset": str(own), "tune": True, "ppl": (), "report": False}
    folder = quantize(**{**settings, **learned}).folder.path
    measured = {"resume": str(folder), "epochs": 0, "seqlen": 16}
    monkeypatch.chdir(data_dir)
    caplog.clear()
    for text, told in (("own.txt", 1), ("part.txt", 0)):
        warned = found(check({**measured, "ppl": (text,)}), "warning")
        assert [what for what, _ in warned if what == "calibration"] == ["calibration"] * told
    evaluate(folder, ppl="own.txt", seqlen=16)
    (warning,) = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert warning.startswith("own.txt: measured on text that is learned from, so it ")
    identity = json.loads((folder / "run.json").read_text())
    assert identity.pop("texts") == [[str(own), "file"]]
    caplog.clear()
    RunFolder(folder)._write_identity(identity)
    evaluate(folder, ppl="own.txt", seqlen=16)
    assert not [each for each in caplog.records if each.levelname == "WARNING"]


def test_one_of_two_processes(settings, monkeypatch):
    """What a launch of torchrun says; a step of one sample has none for the second."""
    alone = check({**settings, "batch_size": 2})
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = check({**settings, "batch_size": 2})
    assert ("processes", "2, each with at most 1 of 2 samples a step") in found(done, "ok")
    assert done.processes == 2 and done.stream_bytes == alone.stream_bytes // 2
    assert "of each of 2 processes" in preflight_text(done) and "processes" in preflight_values(
        done
    )
    assert any("free on cpu for 2 processes" in text for _, text in found(done, "ok"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # the other one is on another machine
    done = check(settings)
    assert not any("for 2 processes" in text for _, text in found(done, "ok"))
    ((what, text),) = found(done, "failed")
    assert what == "processes" and "use --batch_size 2 or a multiple of it" in text


@pytest.mark.parametrize(
    ("scheme", "target", "name"),
    [
        ("W4A16g16", "transformers", "compressed-tensors"),
        ("W4A4", "native", "lrquant"),
        ("W16A16", "vllm", "dequantized"),
    ],
)
def test_the_format_is_chosen_for_the_target(settings, scheme, target, name):
    done = check({**settings, "scheme": scheme, "target": target})
    assert not done.failed and done.checkpoint is not None
    assert ("format", f"{name}, which {target} loads") in found(done, "ok")


def test_without_a_target_nothing_is_packed(settings):
    done = check(settings)
    assert not done.failed and done.checkpoint is None
    assert ("format", "none: no --save_dir and no --target") in found(done, "ok")


def failing(settings, tmp_path):
    """Changes of the settings, and the one check that must then fail with these words."""
    file = tmp_path / "file"
    file.write_text("")
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    run, saved = settings["output_dir"], str(tmp_path / "saved")
    return {
        "model": ({"model": str(tmp_path / "none")}, "no such folder"),
        "format": ({"scheme": "W4A4", "target": "vllm"}, "--scheme W4A4-sym-qkv16"),
        "format-name": ({"format": "gguf", "save_dir": saved}, "use one of"),
        "groups-tokens": (
            {"scheme": "W4A4-ag32"},
            "activation group size 32 does not divide the 48 input columns of mlp.down",
        ),
        "groups": ({"scheme": "W4A16g32"}, "does not divide the 48 input columns of mlp.down"),
        "format-shifts": (
            {"let": True, "let_shift": "always", "target": "transformers"},
            "learn with --let_shift auto",
        ),
        "device": ({"device": "cuda:77"}, "use --device cpu"),
        "calibration": ({"calib_dataset": "nothing"}, "unknown data set 'nothing'"),
        "seqlen": ({"seqlen": 65}, "use --seqlen 64 or less"),
        "statistics": ({"act_scales": str(tmp_path / "no.pt")}, "no such file"),
        "evaluation": ({"ppl": ("nothing",)}, "unknown data set 'nothing'"),
        "evaluation-tta": ({"tta": True}, "no text to adapt to"),
        "evaluation-tasks": ({"tasks": "no_such_task"}, "no_such_task"),
        "output_dir": ({"output_dir": str(file / "run")}, "is a file; use another folder"),
        "save_dir": ({"save_dir": str(other)}, "holds files that are no checkpoint of lrquant"),
        "save_dir-same": ({"save_dir": run}, "this is the run folder"),
        "run folder": ({"resume": str(tmp_path / "none")}, "no run here"),
    }


NAMES = [
    *("model", "format", "format-name", "groups", "groups-tokens", "format-shifts", "device"),
    "calibration",
    *("seqlen", "statistics", "evaluation", "evaluation-tta", "evaluation-tasks"),
    *("output_dir", "save_dir", "save_dir-same", "run folder"),
]


@pytest.mark.parametrize("name", NAMES)
def test_every_refusal(settings, tmp_path, name):
    table = failing(settings, tmp_path)
    assert sorted(table) == sorted(NAMES)
    changes, said = table[name]
    before = tree(tmp_path)
    done = check({**settings, **changes})
    assert [finding.what for finding in done.failed] == [name.partition("-")[0]]
    assert said in done.failed[0].text and "\n" not in done.failed[0].text
    assert tree(tmp_path) == before
    assert said in preflight_text(done)


def test_all_that_fails_is_listed(settings, tmp_path):
    table = failing(settings, tmp_path)
    names = ["format", "groups", "calibration", "evaluation", "output_dir", "save_dir"]
    changes = {key: value for name in names for key, value in table[name][0].items()}
    done = check({**settings, **changes, "scheme": "W4A4g7"})
    failed = [finding.what for finding in done.failed]
    assert set(failed) == set(names)
    groups = [text for what, text in found(done, "failed") if what == "groups"]
    assert len(groups) == 2, "one line for each width that the group does not divide"
    for linear in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"):
        assert linear in groups[0] and linear not in groups[1]
    assert "the 48 input columns of mlp.down_proj" in groups[1]
    assert ("memory, disk, time", "need sizes that fit and a device") in found(done, "not checked")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scheme": "W4A16", "wbits": 3}, "disagree"),
        ({"loss": "mse+mae"}, r"loss 'mse\+mae': use one of mse, nlc"),
        ({"scheme": "W4A16-odd"}, "grid 'odd': use one of int"),
        ({"scheme_for": ("mlp=W4A16-odd",)}, "grid 'odd': use one of int"),
    ],
    ids=str,
)
def test_settings_that_contradict_each_other_are_one_error(settings, changes, said):
    with pytest.raises(LRQuantError, match=said):
        check({**settings, **changes})


def test_sizes_that_a_kernel_asks_for(settings, make_model, tiny_tokenizer, tmp_path):
    target = {"target": "vllm-cpu", "scheme": "W4A16"}
    ((what, kernels),) = found(check({**settings, **target}), "failed")
    assert what == "kernels" and "every linear divisible by 32" in kernels
    assert "mlp.down_proj (48 to 32)" in kernels and "proj (32" not in kernels
    with pytest.raises(LRQuantError, match="divisible by 32"):
        quantize(**settings | target)
    assert not check({**settings, "target": "vllm", "scheme": "W4A16"}).failed, "others take them"
    make_model("llama", intermediate_size=64, hidden_size=64, head_dim=16).save_pretrained(
        tmp_path / "even"
    )
    tiny_tokenizer.save_pretrained(tmp_path / "even")
    even = {"model": str(tmp_path / "even"), **target}
    assert "kernels" in dict(found(check({**settings, **even}), "ok"))


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_parameters_of_a_tied_head_are_counted_once(settings, model_folder, make_model, family):
    """Enough vocabulary to tell: 10,000 rows of 32."""
    size = {"vocab_size": 10_000}
    done = check({**settings, "model": str(model_folder(family, **size))})
    count = sum(p.numel() for p in make_model(family, **size).parameters()) / 1e6
    assert found(done, "ok")[1] == ("model", f"llama, 2 blocks, {count:.1f} M parameters")


def test_what_each_runtime_computes_is_said(settings):
    asked = {**settings, "scheme": "W4A8-sym-qkv16", "activation_symmetric": True}
    warned = [text for what, text in found(check({**asked, "target": "vllm"}), "warning")]
    assert any(text.startswith("vllm computes 16-bit activations wherever") for text in warned)
    assert any("not for vLLM's CPU build: it leaves activations" in text for text in warned)
    (failed,) = check({**asked, "target": "vllm-cpu"}).failed
    assert "--scheme W8A8-sym-qkv16, " in failed.text
    done = check({**asked, "format": "compressed-tensors"})
    said = [text for what, text in found(done, "ok") if what == "runtime"]
    assert said == ["transformers computes what was learned"]
    assert "--linear-backend humming" in dict(found(done, "warning"))["runtime"]


def test_a_finished_run_in_the_place(settings, tmp_path):
    quantize(**settings, report=False)
    done = check(settings)
    assert found(done, "failed")[0][0] == "run folder"
    assert "holds a run of 2 learned blocks" in done.failed[0].text
    assert not check({**settings, "overwrite": True}).failed
    resumed = check({**settings, "resume": settings["output_dir"]})
    assert ("run folder", "2 of 2 blocks are learned") in found(resumed, "ok")
    assert resumed.seconds.learning == 0
    measured = {"resume": settings["output_dir"], "epochs": 0, "ppl": ("wikitext2",)}
    done = check({**measured, "data_dir": settings["data_dir"], "seqlen": 16})
    assert not done.failed and done.seconds.learning == 0 < done.seconds.measuring
    assert "calibration" not in [finding.what for finding in done.findings]
    other = check({**settings, "resume": settings["output_dir"], "epochs": 2})
    assert "its learning epochs differs" in other.failed[0].text
    shutil.rmtree(tmp_path / "runs" / "run" / "blocks")
    assert check({**settings, "resume": settings["output_dir"]}).seconds.learning > 0


def test_other_files_in_the_run_folder_are_warned_of(settings, tmp_path):
    (tmp_path / "runs" / "run").mkdir(parents=True)
    (tmp_path / "runs" / "run" / "notes.txt").write_text("mine")
    done = check(settings)
    assert not done.failed
    assert "notes.txt" in dict(found(done, "warning"))["output_dir"]


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_folder_that_cannot_be_written(settings, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    done = check({**settings, "output_dir": str(tmp_path / "locked" / "run")})
    assert "cannot be written" in done.failed[0].text


def test_too_little_disk_and_memory(settings, monkeypatch):
    monkeypatch.setattr(places.shutil, "disk_usage", lambda path: SPACE(10, 9, 1))
    done = check(settings)
    assert [finding.what for finding in done.failed] == ["disk"]
    assert "free some space" in done.failed[0].text
    monkeypatch.undo()
    need = check(settings).memory.peak
    monkeypatch.setattr(
        checks, "estimate_memory", lambda *a: dataclasses.replace(MEMORY, learning=need**2)
    )
    done = check(settings)
    assert [finding.what for finding in done.failed] == ["memory"]
    assert "--offload disk" in done.failed[0].text


def test_a_whole_model_over_several_places_is_told_and_not_refused(settings, monkeypatch):
    pytest.importorskip("accelerate", reason="needs the extra lrquant[eval]")
    asked = {**settings, "calib_dataset": "self"}
    assert not [each for each in check(asked).findings if each.what == "whole model"]
    monkeypatch.setattr(placement, "free_memory", lambda device: 0)
    assert not [each for each in check(settings).findings if each.what == "whole model"]
    done = check(asked)
    (told,) = [each for each in done.findings if each.what == "whole model"]
    assert told.state == "warning" and not done.failed
    expected = "the whole model for calibration set self needs 0.0 GB: 2 blocks on the disk, which"
    assert told.text.startswith(expected)
    monkeypatch.setattr(placement, "free_room", lambda device: {0: 10, "cpu": 2**40})
    ((what, text),) = found(check(asked), "failed")
    assert what == "whole model" and "GB on cuda:0 at least" in text


def test_a_block_that_cannot_fit_is_not_measured(settings, monkeypatch):
    monkeypatch.setattr(checks, "free_memory", lambda device: 1000)
    monkeypatch.setattr(checks, "probe_kinds", None)
    done = check(settings)
    assert [finding.what for finding in done.failed] == ["memory"]
    assert "one block needs more than" in done.failed[0].text and done.seconds is None


def test_a_block_of_experts_that_cannot_fit_names_their_groups(settings, model_folder, monkeypatch):
    settings = {**settings, "model": str(model_folder("qwen3_moe")), "scheme": "W4A16g16"}
    done = check({**settings, "expert_group": 3})
    assert not done.failed and {kind.costs.groups for kind in done.costs} == {2}
    monkeypatch.setattr(checks, "free_memory", lambda device: 1000)
    assert "use --expert_group 16, a machine" in check(settings).failed[0].text
    assert "--expert_group" not in check({**settings, "expert_group": 3}).failed[0].text


def test_groups_of_experts_are_refused_where_there_are_none(settings):
    ((what, text),) = found(check({**settings, "expert_group": 3}), "failed")
    assert what == "experts" and "--expert_group 3: no block of" in text and "leave it out" in text
    with pytest.raises(LRQuantError, match="leave it out"):
        quantize(**settings, expert_group=3)


@pytest.mark.parametrize(
    ("storage", "handed", "needed"), [("host", 1, 4), ("disk", 1, 2), ("disk", 0, 0)]
)
def test_what_a_gpu_leaves_on_the_host_is_compared(monkeypatch, storage, handed, needed):
    """Keys and values handed on are there wherever the hidden states are."""
    unit = 10**10
    monkeypatch.setattr(checks.psutil, "virtual_memory", lambda: FREE(unit))
    report = Preflight(Config(), processes=4, local_processes=2, stream_bytes=unit)
    checks._compare_host(report, storage, handed * unit)
    said = [f"about {needed * 10:.2f} GB needed"] if needed else []
    assert [text.partition(",")[0] for _, text in found(report, "failed")] == said
    assert all(("--offload" in text) == (storage == "host") for _, text in found(report, "failed"))


MEMORY = Memory(embedding=1, learning=1, measuring=1)


def test_missing_published_sets_are_warned_of(settings):
    """--eval_ppl measures what can be had; sets asked for by name must be there."""
    done = check({**settings, "eval_ppl": True})
    assert not done.failed
    assert dict(found(done, "warning"))["evaluation"] == "left out: ptb, c4, ptb-new, c4-new"


# The command


def arguments(settings, *more):
    flags = [["--" + name, str(value)] for name, value in settings.items()]
    return ["check", *(part for flag in flags for part in flag), *map(str, more)]


def test_the_command_and_its_exit_codes(settings, capsys):
    assert main(arguments(settings, "--target", "transformers")) == 0
    out = capsys.readouterr().out
    for part in ("scheme: W4A16g16", "estimates, not promises", "peak memory", "a learning step"):
        assert part in out
    assert main(arguments(settings, "--scheme", "W4A4", "--target", "vllm", "--ppl", "no")) == 2
    streams = capsys.readouterr()
    assert (
        streams.err.splitlines() == [streams.err.strip()]
        and "failed: format, evaluation" in streams.err
    )
    assert streams.out.count("failed ") == 2
    assert main(arguments(settings, "--scheme", "W99")) == 2
    assert capsys.readouterr().out == ""


def test_json(settings, capsys):
    assert main(arguments(settings, "--json", "--eval_ppl")) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["passed"] is True and values["memory"]["learning"] > 0
    assert values.keys() == preflight_values(check(settings)).keys()
    assert main(arguments(settings, "--json", "--ppl", "no")) == 2
    values = json.loads(capsys.readouterr().out)
    assert values["passed"] is False
    assert [f["what"] for f in values["findings"] if f["state"] == "failed"] == ["evaluation"]


def test_a_file_of_settings(settings, tmp_path, capsys):
    path = tmp_path / "settings.yaml"
    path.write_text("".join(f"{name}: {value}\n" for name, value in settings.items()))
    assert main(["check", "--config", str(path)]) == 0
    assert "W4A16g16" in capsys.readouterr().out


def test_each_warning_can_be_reached(settings, monkeypatch):
    """A tokenizer of another model, unpacked weights, and a disk that is nearly full."""
    monkeypatch.setattr(SkeletonSource, "unpacked_from", lambda self: "Q4_1")
    monkeypatch.setattr("lrquant.data.vocabulary.FAR", 0.0)
    done = check(settings)
    warned = dict(found(done, "warning"))
    assert "unpacked from Q4_1" in warned["weights"] and not done.failed
    assert "is it the model's own?" in warned["tokenizer"]
    for share, state in ((0.5, "ok"), (0.95, "warning"), (2, "failed")):
        space = SPACE(1, 1, int(done.run_bytes / share) + 1)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, space=space: space)
        assert "disk" in dict(found(check(settings), state))
