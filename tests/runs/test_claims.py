"""Folders of others are refused, and what is read is what was written."""

from __future__ import annotations

import os

import pytest
import torch

from lrquant.config.config import Config
from lrquant.errors import LRQuantError
from lrquant.files.whole import read_plain, write_whole
from lrquant.ingredients.base.statistics import ChannelStatistics, require_replaceable
from lrquant.measures.evaluation.resolution import resolve_settings
from lrquant.runs.block_file import BlockRecord, LearnedFile
from lrquant.runs.claims import require_claimable
from lrquant.runs.folder import RunFolder
from lrquant.runs.journal import JOURNAL, Journal

IDENTITY = {
    "model": {"blocks": 2},
    "scheme": {"weight_bits": 4},
    "data": {"set": "x", "sha256": "1"},
}


def record(block):
    return BlockRecord(block, 1.0, 0.5, [0.7, 0.5], 1.5, 1000, [])


@pytest.fixture
def run(tmp_path):
    folder = RunFolder.create(tmp_path / "run", Config(model="m"), IDENTITY)
    for block in (0, 1):
        folder.save_diagnostics(block, {"samples": block}, {"x": torch.ones(2)})
        folder.save_block({"lwc.q.upper": torch.full((2, 1), float(block))}, record(block))
    folder.add_results({"perplexity": {"a": {"quantized": 1.0}}})
    return folder


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "name",
    ["config.yaml", "report.md", "results.json", "run.log", "blocks/a", "tasks/a", "tower/a"],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_names_of_a_run_that_are_someone_elses(tmp_path, name, overwrite):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    config = Config(model="m", overwrite=overwrite)
    with pytest.raises(LRQuantError, match=name.split("/")[0]):
        RunFolder.start(tmp_path, config, IDENTITY, None)
    assert snapshot(tmp_path) == {tmp_path / name: b"mine"}


def test_a_model_s_folder_and_a_folder_of_results(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(LRQuantError, match="a model's folder"):
        require_claimable(tmp_path, "run")
    results = RunFolder(tmp_path / "results")
    results.begin_results()
    results.add_results({"perplexity": {"a": {"full_precision": 1.0}}})
    results.begin_results()
    assert "a" in results.results()["perplexity"]
    with pytest.raises(LRQuantError, match="holds results of `lrquant evaluate`"):
        RunFolder.start(results.path, Config(overwrite=True), IDENTITY, None)
    with pytest.raises(LRQuantError, match="holds a run"):
        run = RunFolder.create(tmp_path / "run", Config(), IDENTITY)
        run.begin_results()


@pytest.mark.parametrize("name", ["results.json", "blocks/0001.safetensors", "config.yaml"])
def test_overwriting_stops_at_what_was_changed(run, name):
    (run.path / name).write_text("mine now")
    before = snapshot(run.path)
    with pytest.raises(LRQuantError, match=f"{name}: changed or damaged"):
        RunFolder.start(run.path, Config(overwrite=True), IDENTITY, None)
    assert snapshot(run.path) == before


def test_overwriting_removes_the_run_s_own_files_alone(run):
    (run.path / "blocks" / "mine").write_text("mine")
    (run.path / "mine").write_text("mine")
    RunFolder.start(run.path, Config(overwrite=True), IDENTITY, None)
    assert sorted(path.relative_to(run.path).as_posix() for path in snapshot(run.path)) == [
        *("blocks/mine", "config.yaml", JOURNAL, "mine", "run.json")
    ]


@pytest.mark.parametrize("removed", range(6))
def test_a_replacement_that_was_cut_off_is_taken_up(run, monkeypatch, removed):
    remove, calls = Journal.remove, []

    def cut_off(self, name):
        calls.append(name)
        if len(calls) > removed:
            raise KeyboardInterrupt
        remove(self, name)

    monkeypatch.setattr(Journal, "remove", cut_off)
    with pytest.raises(KeyboardInterrupt):
        RunFolder.start(run.path, Config(overwrite=True), IDENTITY, None)
    monkeypatch.undo()
    with pytest.raises(LRQuantError, match="no run here"):
        RunFolder.start(run.path, Config(), IDENTITY, run.path)
    again = RunFolder.start(run.path, Config(), IDENTITY, None)
    assert again.finished_blocks() == 0 and again.results() == {}


@pytest.mark.parametrize("name", ["config.yaml", "run.json", "blocks.jsonl"])
def test_small_files_come_anew(run, name):
    before = (run.path / name).read_bytes()
    (run.path / name).unlink()
    folder = RunFolder.start(run.path, Config(model="m"), IDENTITY, run.path)
    assert [entry.final_loss for entry in folder.records()] == [0.5, 0.5]
    if name != "blocks.jsonl":
        assert (run.path / name).read_bytes() == before


def test_the_identity_of_another_run_does_not_come_anew(run):
    (run.path / "run.json").unlink()
    other = {**IDENTITY, "scheme": {"weight_bits": 3}}
    with pytest.raises(LRQuantError, match="of a run with another model, scheme or data"):
        RunFolder.start(run.path, Config(model="m"), other, run.path)


@pytest.mark.parametrize("place", [0, 9, 40, 200, -1])
@pytest.mark.parametrize("kind", ["blocks", "diagnostics"])
def test_a_flipped_bit(run, kind, place):
    path = run.path / kind / "0001.safetensors"
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    load = run.load_block if kind == "blocks" else run.load_diagnostics
    with pytest.raises(LRQuantError, match=r"0001\.safetensors: changed or damaged"):
        load(1)


def test_blocks_of_another_run_or_place(run, tmp_path):
    other = RunFolder.create(tmp_path / "other", Config(), {**IDENTITY, "model": {"blocks": 3}})
    content = run.block_path(1).read_bytes()
    run.block_path(0).write_bytes(content)
    with pytest.raises(LRQuantError, match="changed or damaged"):
        run.load_block(0)
    run.block_path(0).unlink()
    run.journal.write("blocks/0000.safetensors", content)
    with pytest.raises(LRQuantError, match=r"was written as blocks/0001\.safetensors"):
        run.load_block(0)
    other.journal.write("blocks/0001.safetensors", content)
    with pytest.raises(LRQuantError, match="of a run with another model"):
        other.load_block(1)


@pytest.mark.parametrize("content", [b"", b"x" * 9, b"\xff" * 40, b"\x02" + b"\0" * 7 + b"{}"])
def test_a_file_that_is_no_block(tmp_path, content):
    with pytest.raises(LRQuantError, match="not a file of a learned block; do"):
        LearnedFile.read(tmp_path, content, "do")


def test_a_pipe_a_folder_and_a_link(run, tmp_path):
    path = run.path / "results.json"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(LRQuantError, match="cannot be read"):
        run.results()
    path.unlink()
    path.mkdir()
    with pytest.raises(LRQuantError, match="cannot be read"):
        run.results()
    path.rmdir()
    (tmp_path / "mine").write_text("mine")
    path.symlink_to(tmp_path / "mine")
    with pytest.raises(LRQuantError, match="changed or damaged"):
        run.write_text("results.json", "x")
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_journal_of_someone_else_or_with_paths_outside(tmp_path):
    (tmp_path / JOURNAL).write_text('{"mine": 1}\n')
    with pytest.raises(LRQuantError, match="not the list of a run's files"):
        require_claimable(tmp_path, "run")
    (tmp_path / "run").mkdir()
    line = '{"path": "../secret", "sha256": "any"}\n'
    (tmp_path / "run" / JOURNAL).write_text('{"holds": "run"}\n' + line + '{"path": "a", "sha')
    journal = Journal(tmp_path / "run")
    assert journal.ever_listed() == {}
    journal.write("a", "b")
    assert journal.read("a") == b"b" and journal.listed().keys() == {"a"}


def test_a_file_is_whole_readable_as_the_umask_says_and_leaves_no_other(tmp_path):
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "file", "text \udcff")
    finally:
        os.umask(before)
    assert read_plain(tmp_path / "file") == b"text \\udcff"
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_statistics_replace_statistics_alone_and_when_asked(tmp_path):
    files = tmp_path / "scales.pt", tmp_path / "shifts.pt"
    require_replaceable(files, False)
    ChannelStatistics().save(*files)
    with pytest.raises(
        LRQuantError, match=r"scales\.pt: already there; replace it with --overwrite"
    ):
        require_replaceable(files, False)
    require_replaceable(files, True)
    files[0].rename(tmp_path / "kept.pt")
    os.mkfifo(files[0])
    with pytest.raises(LRQuantError, match=r"cannot be read \(not a regular file\)"):
        require_replaceable(files, True)
    (tmp_path / "kept.pt").rename(files[0])
    files[1].write_text("mine")
    with pytest.raises(LRQuantError, match="not a statistics file"):
        require_replaceable(files, True)


def test_what_was_for_once_is_not_kept_for_exports(tmp_path):
    asked = Config(model="m", overwrite=True, log_dir="logs").resolved()
    folder = RunFolder.create(tmp_path, asked, IDENTITY)
    assert not folder.config.overwrite and folder.config.log_dir == "logs"
    given = {"epochs": 0, "resume": str(tmp_path)}
    config, measure_only = resolve_settings(given)
    assert measure_only and config.log_dir is None and not config.overwrite
    assert resolve_settings(given | {"log_dir": "there", "overwrite": True})[0].overwrite
