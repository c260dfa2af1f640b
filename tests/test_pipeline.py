"""quantize(): what a run leaves behind, that it repeats, and goes on where it was killed."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import lrquant
from lrquant import Config, LRQuantError, collect_statistics, evaluate, pipeline, quantize
from lrquant.learn import model as learning
from lrquant.runs.folder import RunFolder

BLOCKS = 3
TOKENS = 16


class Killed(BaseException):
    """As abrupt as a kill can be made within one process."""


@pytest.fixture(scope="module")
def model(make_model):
    return make_model("llama", num_hidden_layers=BLOCKS)


@pytest.fixture(scope="module")
def learn(model, token_ids):
    """learn(folder, **settings) -> a Run of the tiny model on random tokens."""

    def run(folder, model=model, samples=None, **settings):
        defaults = {"scheme": "W4A4", "epochs": 2, "precision": "float32", "report": False}
        defaults |= {"let_init": 1.0}  # far enough from the best for every epoch to gain
        return quantize(
            model,
            calibration=token_ids(4, TOKENS) if samples is None else samples,
            output_dir=str(folder),
            **(defaults | settings),
        )

    return run


@pytest.fixture(scope="module")
def reference(learn, tmp_path_factory):
    """One undisturbed run, with a report; not to be changed."""
    return learn(tmp_path_factory.mktemp("reference") / "run", report=True)


@pytest.fixture(scope="module")
def data_dir(make_set):
    return make_set(lambda split, number: f"{split} {number * number}", 60)


def learned_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder, "blocks").iterdir())}


def learned_values(folder):
    """The tensors' bytes alone: a file's header says of which run it is."""
    return {
        name: content[8 + int.from_bytes(content[:8], "little") :]
        for name, content in learned_bytes(folder).items()
    }


# What a run is and leaves behind


def test_the_log_starts_with_the_scheme(reference):
    lines = (reference.folder.path / "run.log").read_text().splitlines()
    assert "scheme W4A4" in lines[0] and any("calibration" in line for line in lines)


def test_samples_longer_than_the_model_are_refused(make_model, token_ids, tmp_path):
    with pytest.raises(LRQuantError, match="65 tokens: the model has 64 positions"):
        quantize(make_model("opt"), "W4A4", calibration=token_ids(2, 65), output_dir=str(tmp_path))
    assert not (tmp_path / "blocks" / "0000.safetensors").exists()


@pytest.mark.parametrize("device", ["meta", "mps", "cuda:99", "nonsense"])
def test_a_device_that_is_not_there_is_refused(learn, tmp_path, device):
    with pytest.raises(LRQuantError, match=f"device '{device}'"):
        learn(tmp_path / "run", device=device)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"model": None}, "model of type NoneType: expected a folder"),
        ({"model": 3}, "model of type int"),
        ({"scheme": 4}, "scheme '4': expected W<bits>"),
        ({"scheme": ["W4A4"]}, "scheme: expected text"),
        ({"scheme": "W4A4-odd"}, "grid 'odd': use one of int"),
        ({"loss": "mae"}, "loss 'mae': use one of mse, nlc, or several joined by +"),
        ({"epochs": None}, "epochs: expected a whole number, got None"),
        ({"save_dir": b"x"}, "save_dir: expected text, got b'x'"),
        ({"bits": 4}, "unknown setting 'bits'"),
        ({"samples": {1: 2}}, "calibration of type dict: expected texts"),
        ({"samples": torch.zeros(4)}, "calibration of shape (4,) and torch.float32: expected"),
        ({"samples": torch.zeros(0, 16, dtype=torch.int64)}, "calibration of shape (0, 16)"),
        ({"rotate_rank": 33, "lr_plus": True}, "--rotate_rank 33: "),
    ],
    ids=str,
)
def test_arguments_of_another_kind_are_refused(learn, tmp_path, arguments, said):
    with pytest.raises(LRQuantError) as error:
        learn(tmp_path / "run", **arguments)
    assert said in str(error.value) and not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize("target", ["", " ", None, 3, b"x"])
def test_a_target_that_is_none_is_refused(target, tmp_path, monkeypatch):
    (tmp_path / "run.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LRQuantError, match="give a run folder, a checkpoint or a model"):
        evaluate(target)


def test_results_of_a_plain_model_go_where_asked(model_folder, data_dir, tmp_path):
    settings = {"data_dir": str(data_dir), "seqlen": 16, "limit": 2}
    results = evaluate(str(model_folder("llama")), output_dir=str(tmp_path / "out"), **settings)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results


def test_a_run_folder_is_complete(reference):
    path = reference.folder.path
    assert sorted(entry.name for entry in path.iterdir()) == [
        *("blocks", "blocks.jsonl", "config.yaml", "diagnostics", "lrquant-files.jsonl"),
        *("report.html", "report.json", "report.md", "results.json", "run.json", "run.log"),
    ]
    assert sorted(learned_bytes(path)) == [f"{block:04d}.safetensors" for block in range(BLOCKS)]
    assert RunFolder.open(path).config == reference.config == reference.config.resolved()


def test_the_report_changes_nothing_else(reference, learn, tmp_path):
    run = learn(tmp_path, report=False)
    assert learned_bytes(tmp_path) == learned_bytes(reference.folder.path)
    assert [r.epoch_losses for r in run.records] == [r.epoch_losses for r in reference.records]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        *("blocks", "blocks.jsonl", "config.yaml", "lrquant-files.jsonl", "results.json"),
        *("run.json", "run.log"),
    ]


def test_a_record_a_block(reference):
    lines = (reference.folder.path / "blocks.jsonl").read_text().splitlines()
    assert [json.loads(line)["block"] for line in lines] == list(range(BLOCKS))
    for record in reference.records:
        assert len(record.epoch_losses) == 2 and record.non_finite == []
        assert record.initial_loss > 0 and record.final_loss > 0
        assert record.seconds > 0 and record.peak_memory_bytes > 2**20


def test_the_log_says_what_happened(reference):
    log = (reference.folder.path / "run.log").read_text()
    for record in reference.records:
        assert (
            f"block {record.block}: loss {record.initial_loss:.6g} -> {record.final_loss:.6g}"
            in log
        )


def test_learning_lowers_the_losses(learn, tmp_path):
    def losses(name, **settings):
        records = learn(tmp_path / name, scheme="W3A16", lwc=True, let=True, **settings).records
        return [record.initial_loss for record in records], [
            record.final_loss for record in records
        ]

    before, after = losses("learned", epochs=15)
    assert all(final < initial for initial, final in zip(before, after, strict=True))
    assert sum(after) < 0.95 * sum(before)
    before, after = losses("nothing learned", epochs=0)
    assert after == pytest.approx(before)


def test_the_resolved_scheme_is_said_first(learn, tmp_path, caplog):
    caplog.set_level(logging.INFO, "lrquant")
    learn(tmp_path, epochs=0)
    first, second, third, *_ = caplog.messages
    assert first.startswith("scheme W4A4: weights 4 bits") and "Q, K, V 4 bits" in first
    assert second == "method round to nearest: nothing is learned"
    assert third == "matrix products in float32 on cpu"


def test_the_model_in_memory_is_not_changed(model, learn, tmp_path):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    learn(tmp_path)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.config._attn_implementation == "sdpa"


def test_public_names():
    assert all(hasattr(lrquant, name) for name in lrquant.__all__)


# The same again, and not the same


def test_scheme_and_bits_give_the_same(reference, learn, tmp_path):
    other = learn(tmp_path, scheme=None, wbits=4, abits=4, lwc=True, let=True)
    assert learned_bytes(tmp_path) == learned_bytes(reference.folder.path)
    assert other.config.scheme == reference.config.scheme == "W4A4"
    with pytest.raises(LRQuantError, match="scheme W4A4 and wbits 3 disagree"):
        learn(tmp_path / "other", scheme="W4A4", wbits=3)


def test_offload_does_not_change_a_bit(reference, learn, tmp_path):
    for place in ("device", "host", "disk"):
        learn(tmp_path / place, offload=place)
        assert learned_bytes(tmp_path / place) == learned_bytes(reference.folder.path), place
    assert not list((tmp_path / "disk").glob(".lrquant-*"))


@pytest.mark.parametrize(
    "settings",
    [
        {"let_lr": 4e-3},
        {"lwc_lr": 2e-2},
        {"loss": "mse"},
        {"batch_size": 2},
        {"epochs": 3, "keep_best": False},
    ],
    ids=str,
)
def test_what_changes_the_bytes(reference, learn, tmp_path, settings):
    learn(tmp_path, **settings)
    ours, theirs = learned_values(tmp_path), learned_values(reference.folder.path)
    assert not any(ours[name] == theirs[name] for name in theirs)


def test_other_samples_give_other_bytes(reference, learn, token_ids, tmp_path):
    learn(tmp_path, samples=token_ids(4, TOKENS).flip(1))
    assert learned_values(tmp_path) != learned_values(reference.folder.path)


@pytest.mark.parametrize("batch_size", [2, 3, 100])
def test_batches_that_do_not_divide_the_samples(learn, token_ids, tmp_path, batch_size):
    run = learn(tmp_path, samples=token_ids(5, TOKENS), batch_size=batch_size, let_lr=0, lwc_lr=0)
    one = learn(tmp_path / "one", samples=token_ids(5, TOKENS), let_lr=0, lwc_lr=0)
    for ours, theirs in zip(run.records, one.records, strict=True):
        assert ours.initial_loss == pytest.approx(theirs.initial_loss, rel=0.1)
        assert ours.final_loss == pytest.approx(ours.initial_loss, rel=1e-5)


def test_both_precisions_run_and_agree(learn, tmp_path):
    losses = {}
    for precision in ("float32", "bfloat16"):
        run = learn(tmp_path / precision, scheme="W8A8", precision=precision)
        assert run.results["precision"] == precision
        losses[precision] = [record.final_loss for record in run.records]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.5)
    assert learned_values(tmp_path / "float32") != learned_values(tmp_path / "bfloat16")


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_statistics_on_the_way_equal_those_from_a_file(
    family, model_folder, data_dir, learn, tmp_path
):
    folder = str(model_folder(family))
    settings = {
        **{"data_dir": str(data_dir), "nsamples": 4, "seqlen": TOKENS, "precision": "float32"},
        **{"epochs": 1, "let": True, "lwc": True, "report": False},
    }
    quantize(folder, "W4A4", output_dir=str(tmp_path / "way"), **settings)
    statistics = collect_statistics(Config(model=folder, **settings))
    files = tmp_path / "scales.pt", tmp_path / "shifts.pt"
    statistics.save(*files)
    given = dict(zip(("act_scales", "act_shifts"), map(str, files), strict=True))
    quantize(folder, "W4A4", output_dir=str(tmp_path / "file"), **settings, **given)
    assert learned_values(tmp_path / "file") == learned_values(tmp_path / "way")
    for values in statistics.maxima.values():
        values *= 2
    statistics.save(*files)
    quantize(folder, "W4A4", output_dir=str(tmp_path / "other"), **settings, **given)
    assert learned_values(tmp_path / "other") != learned_values(tmp_path / "way")


# LRQuant+

PLUS = {"lr_plus": True, "epochs": 3}


def test_each_part_alone_changes_the_bytes(reference, learn, tmp_path):
    parts = ("rotation", "two_branch", "dynamic_weights")
    folders = [reference.folder.path]
    for name in parts:
        learn(tmp_path / name, **{name: True})
        folders.append(tmp_path / name)
    learn(tmp_path / "all", lr_plus=True)
    folders.append(tmp_path / "all")
    contents = [learned_values(folder) for folder in folders]
    for block in range(1, BLOCKS):  # the first block's two branches have one target
        name = f"{block:04d}.safetensors"
        assert len({content[name] for content in contents}) == len(folders)


def test_what_lrquant_plus_is_said_to_be(learn, tmp_path, caplog):
    caplog.set_level(logging.INFO, "lrquant")
    run = learn(tmp_path, **PLUS)
    line = next(line for line in caplog.messages if line.startswith("method"))
    assert line.startswith("method LRQuant+: weight clipping") and "two branches" in line
    assert "factors of rank 1, input side shared at norms" in line
    assert run.results["method_name"] == "LRQuant+"
    for record in run.records:
        assert len(record.held_losses) == 3 and record.best_epoch in range(4)
        best = [record.initial_loss, *record.held_losses][record.best_epoch]
        assert record.final_loss == pytest.approx(best, rel=1e-5)


def test_the_homologous_branch_is_computed_once_a_block(learn, tmp_path, monkeypatch):
    """Two full-precision passes a block, one a stream, however many steps are taken."""
    calls = []
    advance = learning.advance_full_precision

    def counting(workbench, index, stored, entry, stream, into, *observer):
        calls.append((index, stream is into))
        advance(workbench, index, stored, entry, stream, into, *observer)

    monkeypatch.setattr(learning, "advance_full_precision", counting)
    learn(tmp_path, two_branch=True, epochs=4)
    assert calls == [(block, own) for block in range(BLOCKS) for own in (True, False)]


def test_the_homologous_target_is_the_full_precision_block_on_the_quantised_input(
    model, learn, tmp_path, monkeypatch
):
    seen = []
    fit = learning.fit_in_groups

    def fitting(view, runner, data, *rest):
        streams = (data.inputs, *data.targets)
        seen.append([stream.states.clone().unflatten(0, (-1, TOKENS)) for stream in streams])
        return fit(view, runner, data, *rest)

    monkeypatch.setattr(learning, "fit_in_groups", fitting)
    learn(tmp_path, two_branch=True)
    for index, (inputs, propagated, homologous) in enumerate(seen):
        block = model.model.layers[index]
        arguments = found_arguments(model, index)
        with torch.no_grad():
            found = block(inputs, **arguments)
        torch.testing.assert_close(homologous, found, rtol=1e-4, atol=1e-4)
        same = torch.equal(propagated, homologous)
        assert same == (index == 0), "the streams part after the first block"


def found_arguments(model, index):
    """What transformers itself passes to one block for TOKENS tokens."""
    seen = {}
    block = model.model.layers[index]
    handle = block.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        model(torch.ones(1, TOKENS, dtype=torch.long), use_cache=False)
    handle.remove()
    return seen


@pytest.mark.parametrize("sharing", ["site", "linear", "weight"])
def test_a_killed_lrquant_plus_run_goes_on_to_the_same_bytes(learn, tmp_path, monkeypatch, sharing):
    settings = {**PLUS, "rotation_sharing": sharing}
    learn(tmp_path / "whole", **settings)
    interrupted(monkeypatch, "after it is saved", 0)
    with pytest.raises(Killed):
        learn(tmp_path / "killed", **settings)
    monkeypatch.undo()
    learn(tmp_path / "killed", resume=str(tmp_path / "killed"), **settings)
    assert learned_bytes(tmp_path / "killed") == learned_bytes(tmp_path / "whole")
    with pytest.raises(LRQuantError, match="rotation_sharing differs"):
        other = {**settings, "rotation_sharing": "none"}
        learn(tmp_path / "killed", resume=str(tmp_path / "killed"), **other)


@pytest.mark.parametrize(("scheme", "lwc"), [("W4A4", None), ("W2A16g16", True)])
def test_lrquant_plus_lowers_the_losses_of_a_model(learn, tmp_path, scheme, lwc):
    for record in learn(tmp_path, scheme=scheme, lwc=lwc, lr_plus=True, epochs=8).records:
        assert record.final_loss < 0.97 * record.initial_loss


# Killed, and going on


def interrupted(monkeypatch, where, block=1):
    """Make a run die at one point of one block."""
    save, fit = RunFolder.save_block, learning.fit_in_groups
    rename = os.replace

    def saving(self, parameters, record):
        if where == "before it is saved" and record.block == block:
            raise Killed
        save(self, parameters, record)
        if where == "after it is saved" and record.block == block:
            raise Killed

    def fitting(view, runner, data, *rest):
        report = fit(view, runner, data, *rest)
        if where == "after it is learned" and data.index == block:
            raise Killed
        return report

    def renaming(source, target):
        if where == "before its rename" and str(target).endswith(f"{block:04d}.safetensors"):
            raise Killed
        return rename(source, target)

    monkeypatch.setattr(RunFolder, "save_block", saving)
    monkeypatch.setattr(learning, "fit_in_groups", fitting)
    monkeypatch.setattr(os, "replace", renaming)


POINTS = ["after it is learned", "before it is saved", "before its rename", "after it is saved"]


@pytest.mark.parametrize("block", range(BLOCKS))
@pytest.mark.parametrize("where", POINTS)
def test_a_killed_run_goes_on_to_the_same_bytes(
    reference, learn, tmp_path, monkeypatch, where, block
):
    interrupted(monkeypatch, where, block)
    with pytest.raises(Killed):
        learn(tmp_path)
    monkeypatch.undo()
    finished = block + (where == "after it is saved")
    assert RunFolder.open(tmp_path).finished_blocks() == finished
    if finished < BLOCKS:
        (tmp_path / "blocks").mkdir(exist_ok=True)
        (tmp_path / "blocks" / f".lrquant-{'0' * 32}.tmp").write_bytes(b"half a file")
    run = learn(tmp_path, resume=str(tmp_path))
    assert learned_bytes(tmp_path) == learned_bytes(reference.folder.path)
    assert [record.final_loss for record in run.records] == [
        record.final_loss for record in reference.records
    ]
    said = f"resuming after block {finished} of {BLOCKS}" in (tmp_path / "run.log").read_text()
    assert said == (0 < finished < BLOCKS)


def diagnostics_bytes(folder):
    return {path.name: path.read_bytes() for path in Path(folder, "diagnostics").iterdir()}


def test_the_report_of_a_killed_run_is_that_of_an_undisturbed_one(
    reference, learn, tmp_path, monkeypatch
):
    interrupted(monkeypatch, "before it is saved", block=1)
    with pytest.raises(Killed):
        learn(tmp_path / "a", report=True)
    monkeypatch.undo()
    assert len(diagnostics_bytes(tmp_path / "a")) == 2
    learn(tmp_path / "b", resume=str(tmp_path / "a"), report=True)
    expected = diagnostics_bytes(reference.folder.path)
    assert len(expected) == BLOCKS and diagnostics_bytes(tmp_path / "b") == expected
    assert learned_bytes(tmp_path / "b") == learned_bytes(reference.folder.path)
    assert (
        json.loads((tmp_path / "b" / "report.json").read_text())["missing"]
        == json.loads((reference.folder.path / "report.json").read_text())["missing"]
    )


def test_a_killed_start_leaves_nothing_to_resume(learn, tmp_path, monkeypatch):
    original = RunFolder.write_text

    def writing(self, name, text):
        if name == "run.json":
            raise Killed
        original(self, name, text)

    monkeypatch.setattr(RunFolder, "write_text", writing)
    with pytest.raises(Killed):
        learn(tmp_path)
    monkeypatch.undo()
    with pytest.raises(LRQuantError, match="no run here"):
        learn(tmp_path, resume=str(tmp_path))
    learn(tmp_path)


STOPS_AFTER_A_BLOCK = """
import sys, time, torch
from transformers import AutoModelForCausalLM
from lrquant import quantize
from lrquant.runs.folder import RunFolder

save = RunFolder.save_block
def saving(self, parameters, record):
    save(self, parameters, record)
    time.sleep(600)
RunFolder.save_block = saving
folder, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder)
quantize(model, "W4A4", calibration=torch.load(folder + "/ids.pt"), output_dir=output, epochs=2,
         precision="float32", let_init=1.0)
"""


def test_a_real_kill(model, reference, learn, token_ids, tmp_path):
    """And so two processes with the same seed write the same bytes."""
    model.save_pretrained(tmp_path / "model")
    torch.save(token_ids(4, TOKENS), tmp_path / "model" / "ids.pt")
    output = tmp_path / "run"
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", STOPS_AFTER_A_BLOCK, str(tmp_path / "model"), str(output)]
    process = subprocess.Popen(command, env=os.environ | threads)
    try:
        deadline = time.monotonic() + 120
        while not (output / "blocks" / "0000.safetensors").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len((output / "blocks.jsonl").read_text().splitlines()) == 1
    first = learned_bytes(reference.folder.path)["0000.safetensors"]
    assert learned_bytes(output) == {"0000.safetensors": first}
    learn(output, resume=str(output))
    assert learned_bytes(output) == learned_bytes(reference.folder.path)


def test_going_on_elsewhere_leaves_the_first_as_it_is(reference, learn, tmp_path, monkeypatch):
    interrupted(monkeypatch, "after it is saved", block=0)
    with pytest.raises(Killed):
        learn(tmp_path / "a")
    monkeypatch.undo()
    run = learn(tmp_path / "b", resume=str(tmp_path / "a"))
    assert learned_bytes(tmp_path / "b") == learned_bytes(reference.folder.path)
    assert len(learned_bytes(tmp_path / "a")) == 1
    assert len(run.records) == BLOCKS and run.config.output_dir == str(tmp_path / "b")


def test_a_finished_run_is_not_learned_again(reference, learn, tmp_path, monkeypatch):
    shutil.copytree(reference.folder.path, tmp_path / "run")
    monkeypatch.setattr(learning, "fit_in_groups", lambda *a: pytest.fail("learned again"))
    learn(tmp_path / "run", resume=str(tmp_path / "run"))
    assert learned_bytes(tmp_path / "run") == learned_bytes(reference.folder.path)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"scheme": "W3A4"}, "scheme weight_bits differs: the run has 4, this command 3"),
        ({"scheme": "W4A4-qkv16"}, "scheme qkv_bits differs: the run has None, this command 16"),
        ({"let_lr": 0.1}, "method let_lr differs: the run has 0.005, this command 0.1"),
        ({"epochs": 3}, "learning epochs differs: the run has 2, this command 3"),
        ({"batch_size": 2}, "learning batch_size differs: the run has 1, this command 2"),
        ({"let": False, "lwc": True}, "method let differs: the run has True, this command nothing"),
        ({"precision": "bfloat16"}, "precision differs: the run has 'float32'"),
        ({"samples": "flipped"}, "data sha256 differs"),
        ({"model": "other"}, "model weights differs"),
    ],
    ids=str,
)
def test_going_on_with_something_else_is_refused(
    reference, learn, make_model, token_ids, settings, said
):
    path = reference.folder.path
    before = learned_bytes(path)
    if "samples" in settings:
        settings = {"samples": token_ids(4, TOKENS).flip(1)}
    if "model" in settings:
        other = make_model("llama", num_hidden_layers=BLOCKS)
        other.model.layers[2].mlp.up_proj.weight[0, 0] += 1
        settings = {"model": other}
    with pytest.raises(LRQuantError) as error:
        learn(path, resume=str(path), **settings)
    assert said in str(error.value)
    assert learned_bytes(path) == before


def test_a_kill_after_a_block_was_learned_anew_leaves_no_mixed_run(
    reference, learn, tmp_path, monkeypatch
):
    shutil.copytree(reference.folder.path, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    folder.block_path(0).unlink()
    save = RunFolder.save_block

    def another_machine(self, parameters, record):
        save(self, {name: value * 1.01 for name, value in parameters.items()}, record)
        raise Killed

    monkeypatch.setattr(RunFolder, "save_block", another_machine)
    with pytest.raises(Killed):
        learn(folder.path, resume=str(folder.path))
    monkeypatch.undo()
    assert folder.finished_blocks() == 1
    learn(folder.path, resume=str(folder.path))
    own, others = learned_bytes(folder.path), learned_bytes(reference.folder.path)
    assert folder.finished_blocks() == BLOCKS and not own.items() & others.items()
    said = f"{BLOCKS - 1} kept blocks from 1 on come after one that is missing or was learned anew"
    assert (folder.path / "run.log").read_text().count(said) == 2


def test_damaged_records_do_not_stop_a_run_that_goes_on(reference, learn, tmp_path):
    shutil.copytree(reference.folder.path, tmp_path / "run")
    (tmp_path / "run" / "blocks.jsonl").write_bytes(b'{"block": 0')
    run = learn(tmp_path / "run", resume=str(tmp_path / "run"))
    losses = [record.epoch_losses for record in reference.records]
    assert [record.epoch_losses for record in run.records] == losses
    assert all(record.seconds == 0 for record in run.records)
    log = (tmp_path / "run" / "run.log").read_text()
    assert log.count("blocks.jsonl: damaged; its records are taken from the blocks") == 1


def test_a_damaged_block_stops_with_its_name(reference, learn, tmp_path):
    shutil.copytree(reference.folder.path, tmp_path / "run")
    (tmp_path / "run" / "blocks" / "0002.safetensors").unlink()
    damaged = tmp_path / "run" / "blocks" / "0001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:50])
    with pytest.raises(LRQuantError, match=r"0001\.safetensors: changed or damaged"):
        learn(tmp_path / "run", resume=str(tmp_path / "run"))


# Measured again


@pytest.fixture
def disk_run(model_folder, data_dir, tmp_path):
    """A finished run of a model on disk."""
    return quantize(
        str(model_folder("llama")),
        "W4A4",
        output_dir=str(tmp_path / "run"),
        data_dir=str(data_dir),
        **{"nsamples": 2, "seqlen": TOKENS, "epochs": 1, "precision": "float32", "report": False},
    )


def test_learned_parameters_are_evaluated_without_calibration_text(
    disk_run, data_dir, tmp_path, monkeypatch
):
    path = disk_run.folder.path
    before = learned_bytes(path), (path / "config.yaml").read_text()
    (tmp_path / "text" / "wikitext2").mkdir(parents=True)
    shutil.copy(data_dir / "wikitext2" / "test.txt", tmp_path / "text" / "wikitext2")
    monkeypatch.setattr(learning, "fit_in_groups", lambda *a: pytest.fail("learned again"))
    settings = {"ppl": ("wikitext2",), "limit": 3, "data_dir": str(tmp_path / "text")}
    done = pipeline.run({"epochs": 0, "resume": str(path), **settings})
    score = done.results["perplexity"]["wikitext2"]["quantized"]
    assert 1 < score < 1e4 and "the first 3 of" in done.results["perplexity"]["wikitext2"]["text"]
    assert (learned_bytes(path), (path / "config.yaml").read_text()) == before
    assert json.loads((path / "results.json").read_text()) == done.results
    again = evaluate(str(path), **settings)
    assert again["perplexity"] == done.results["perplexity"]


def test_learning_makes_a_difference_to_what_is_evaluated(disk_run, data_dir):
    """Negative control: the measured model is the learned one, not round-to-nearest."""
    results = evaluate(str(disk_run.folder.path), ppl=("wikitext2",), compare=True)
    scores = results["perplexity"]["wikitext2"]
    assert len({scores[name] for name in ("full_precision", "round_to_nearest", "quantized")}) == 3


def test_results_go_elsewhere_if_asked(disk_run, tmp_path):
    evaluate(str(disk_run.folder.path), ppl=("wikitext2",), output_dir=str(tmp_path / "there"))
    assert (
        "wikitext2" in json.loads((tmp_path / "there" / "results.json").read_text())["perplexity"]
    )
    assert "wikitext2" not in (disk_run.folder.path / "results.json").read_text()
    assert not (tmp_path / "there" / "run.json").exists()


def test_an_unfinished_run_is_not_evaluated(disk_run):
    disk_run.folder.block_path(1).unlink()
    with pytest.raises(LRQuantError, match=r"1 of 2 blocks are finished; go on with --resume"):
        evaluate(str(disk_run.folder.path), ppl=("wikitext2",))


def test_a_run_whose_model_has_changed_is_not_evaluated(disk_run, make_model):
    other = make_model("llama")
    other.model.norm.weight += 1
    other.save_pretrained(disk_run.config.model)
    with pytest.raises(LRQuantError, match="model weights differs"):
        evaluate(str(disk_run.folder.path), ppl=("wikitext2",))


def test_a_model_is_evaluated_in_floating_point(model_folder, data_dir):
    settings = {"data_dir": str(data_dir), "seqlen": TOKENS, "precision": "float32", "limit": 2}
    results = evaluate(str(model_folder("opt")), **settings)
    assert list(results["perplexity"]["wikitext2"])[-1] == "full_precision"
    assert results["scheme"] == "W16A16"


# What is not finite, not possible, or not there


def test_a_loss_that_is_not_finite_is_recorded_and_the_run_goes_on(learn, tmp_path):
    sites = ("norm", "value_output", "query_key")
    run = learn(tmp_path, let_lr=1e30, lwc_lr=1e30, let_sites=sites)
    log = (tmp_path / "run.log").read_text()
    for record in run.records:
        assert record.non_finite == ["epoch 1: back to the best parameters so far"]
        assert record.final_loss == pytest.approx(record.initial_loss) and "NOT FINITE" in log
    lines = (tmp_path / "blocks.jsonl").read_text().splitlines()
    assert len(lines) == BLOCKS and all("back to the best" in line for line in lines)


@pytest.mark.parametrize("epochs", [0, 1])
def test_a_weight_that_is_not_finite_stops_the_run_by_name(make_model, learn, tmp_path, epochs):
    broken = make_model("llama", num_hidden_layers=BLOCKS)
    broken.model.layers[1].self_attn.k_proj.weight[3, 4] = math.nan
    with pytest.raises(LRQuantError, match=r"block 1: self_attn\.k_proj\.weight holds a value"):
        learn(tmp_path, model=broken, epochs=epochs)
    assert RunFolder.open(tmp_path).finished_blocks() == 1


def test_samples_must_be_token_ids(learn, tmp_path):
    for samples in (torch.zeros(4, dtype=torch.int64), torch.zeros(4, 8)):
        with pytest.raises(LRQuantError, match="expected token ids"):
            learn(tmp_path, samples=samples)
    assert not (tmp_path / "run.json").exists()


def test_a_model_in_memory_needs_tokens_or_a_tokenizer(
    model, tmp_path, tiny_tokenizer, token_ids, data_dir
):
    settings = {"output_dir": str(tmp_path), "epochs": 0, "data_dir": str(data_dir)}
    settings |= {"report": False}
    with pytest.raises(LRQuantError, match="no tokenizer"):
        quantize(model, "W4A4", **settings)
    with pytest.raises(LRQuantError, match="no tokenizer: perplexity needs one"):
        quantize(model, "W4A4", ppl="wikitext2", calibration=token_ids(1, TOKENS), **settings)
    short = {"nsamples": 2, "seqlen": TOKENS, "ppl": "wikitext2", "limit": 2}
    run = quantize(model, "W4A4", tokenizer=tiny_tokenizer, **settings, **short)
    assert "wikitext2" in run.results["perplexity"]


def test_settings_of_a_wrong_name_or_type(model, tmp_path):
    for settings, said in (({"epoch": 1}, "unknown setting 'epoch'"), ({"epochs": "x"}, "epochs")):
        with pytest.raises(LRQuantError, match=said):
            quantize(model, "W4A4", output_dir=str(tmp_path), **settings)


def test_everything_is_checked_before_anything_is_learned(model, learn, tmp_path, monkeypatch):
    monkeypatch.setattr(learning, "learn_blocks", lambda *a: pytest.fail("learned already"))
    for settings, said in (
        (
            {"group_size": 5},
            "group size 5 does not divide the 32 input columns of self_attn.q_proj",
        ),
        ({"ppl": ("wikitext2",)}, "tokenizer"),
        ({"save_dir": str(tmp_path)}, "run folder"),
        ({"act_scales": str(tmp_path / "absent.pt")}, "absent.pt: no such file"),
    ):
        with pytest.raises(LRQuantError, match=said):
            learn(tmp_path, **settings)
    assert list(tmp_path.iterdir()) == []


def test_a_group_size_that_fits_some_linears_only(learn, tmp_path):
    with pytest.raises(LRQuantError, match=r"32 does not divide the 48 .*down_proj.*16, 24, 48"):
        learn(tmp_path, scheme="W4A16g32")
    run = learn(tmp_path, scheme="W4A16g16", epochs=1)
    assert run.folder.load_block(0)["lwc.mlp.down_proj.upper"].shape == (32, 3)


def test_the_learned_model_is_a_transformers_model(reference, model, token_ids):
    learned, ids = reference.load_model(), token_ids(2, TOKENS)
    with torch.no_grad():
        difference = (learned(ids).logits - model(ids).logits).abs().max()
    assert 0 < difference < 100
    assert learned.generate(ids[:1, :4], max_new_tokens=3, do_sample=False).shape == (1, 7)


@pytest.mark.parametrize("model", [None, 7, {"model": "m"}, torch.nn.Linear(2, 2)])
def test_what_is_no_model_is_refused(model):
    with pytest.raises(LRQuantError, match="expected a folder, a hub name"):
        quantize(model, "W4A4")


def test_samples_of_another_type_are_refused(make_model, tmp_path):
    settings = {"output_dir": str(tmp_path / "run"), "calibration": 3}
    with pytest.raises(LRQuantError, match="calibration of type int"):
        quantize(make_model("llama"), "W4A4", **settings)


def test_a_rank_above_the_smallest_linear_is_refused(make_model, token_ids, tmp_path):
    settings = {
        "lr_plus": True,
        "output_dir": str(tmp_path / "run"),
        "calibration": token_ids(1, 8),
    }
    with pytest.raises(LRQuantError, match=r"--rotate_rank 17: self_attn.k_proj has 16 rows"):
        quantize(make_model("llama"), "W4A4", rotate_rank=17, **settings)
    assert not (tmp_path / "run").exists()
