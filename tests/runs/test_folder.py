"""The run folder: whole files only, whatever moment a kill or a full disk chooses."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os
from logging.handlers import MemoryHandler
from pathlib import Path

import pytest
import torch

from lrquant.config.config import Config
from lrquant.errors import LRQuantError
from lrquant.files.whole import read_json
from lrquant.runs import chain, journal
from lrquant.runs.claims import held
from lrquant.runs.folder import BlockRecord, RunFolder
from lrquant.runs.journal import Journal

IDENTITY = {
    "model": {"model_type": "llama", "blocks": 3, "weights": "abc"},
    "scheme": {"weight_bits": 4, "activation_bits": 4},
    "learning": {"epochs": 2, "let_lr": 0.005},
    "data": {"set": "wikitext2/train", "sha256": "123"},
    "statistics": [],
    "precision": "float32",
    "calibration": "wikitext2/train, seed 2",
}
FULL = OSError(28, "No space left on device")


class Killed(BaseException):
    """As abrupt as a kill can be made within one process."""


def record(block, final_loss=0.5):
    return BlockRecord(block, 1.0, final_loss, [0.7, final_loss], 1.5, 1000, [])


def parameters(block):
    return {"lwc.q.upper": torch.full((2, 1), float(block)), "let.norm.scale": torch.ones(4)}


def a_run(path, blocks=0):
    folder = RunFolder.create(path, Config(model="m", output_dir=str(path)), IDENTITY)
    for block in range(blocks):
        folder.save_block(parameters(block), record(block))
    return folder


def altered(group, **changes):
    return {**IDENTITY, group: {**IDENTITY[group], **changes}}


def refuse(function, *parts):
    with pytest.raises(LRQuantError) as error:
        function()
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_a_new_run(tmp_path):
    folder = a_run(tmp_path / "deep" / "run")
    assert folder.config == Config(model="m", output_dir=str(tmp_path / "deep" / "run"))
    assert folder.identity == {"format": 4, **IDENTITY}
    assert (folder.finished_blocks(), folder.records()) == (0, [])
    assert RunFolder.open(folder.path).path == folder.path


def test_a_block_comes_back_bit_for_bit(tmp_path):
    folder = a_run(tmp_path)
    values = {"let.x.scale": torch.randn(5, generator=torch.Generator().manual_seed(0))}
    folder.save_block(values, record(0))
    loaded = folder.load_block(0)
    assert loaded.keys() == values.keys()
    assert torch.equal(loaded["let.x.scale"], values["let.x.scale"])
    assert folder.records() == [record(0)]
    assert json.loads((tmp_path / "blocks.jsonl").read_text())["final_loss"] == 0.5


def test_block_files_hold_nothing_but_parameters(tmp_path):
    for name, seconds in (("a", 1.0), ("b", 99.0)):
        values = parameters(0)
        a_run(tmp_path / name).save_block(
            values, BlockRecord(0, 1.0, 0.5, [], seconds, int(seconds), [])
        )
    first, second = (tmp_path / name / "blocks" / "0000.safetensors" for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()


def test_blocks_count_from_the_first_without_gaps(tmp_path):
    folder = a_run(tmp_path, blocks=3)
    folder.block_path(1).unlink()
    assert folder.finished_blocks() == 1
    assert [entry.block for entry in folder.records()] == [0]


def learned_anew(folder, block):
    """Block `block` is moved away and comes out with other bytes, as on another machine."""
    folder.block_path(block).rename(folder.path / "moved")
    other = {**parameters(block), "lwc.q.upper": torch.full((2, 1), 0.1)}
    folder.save_block(other, record(block, final_loss=0.4))


@pytest.mark.parametrize("block", [0, 1])
def test_a_block_learned_anew_leaves_no_older_one_after_it(tmp_path, block):
    folder = a_run(tmp_path, blocks=3)
    learned_anew(folder, block)
    for each in (folder, RunFolder.open(tmp_path)):
        assert each.finished_blocks() == block + 1
        assert [entry.final_loss for entry in each.records()] == [*[0.5] * block, 0.4]
    refuse(folder.require_finished, f"{block + 1} of 3 blocks are finished", "--resume")
    for later in range(block + 1, 3):
        folder.save_block(parameters(later), record(later))
    folder.require_finished()


def test_the_block_that_was_moved_away_may_come_back(tmp_path):
    folder = a_run(tmp_path, blocks=3)
    learned_anew(folder, 1)
    (tmp_path / "moved").rename(folder.block_path(1))
    assert folder.finished_blocks() == 3
    assert [entry.final_loss for entry in folder.records()] == [0.5] * 3


def test_the_same_bytes_again_keep_what_comes_after_them(tmp_path):
    folder = a_run(tmp_path, blocks=3)
    folder.block_path(1).unlink()
    folder.save_block(parameters(1), record(1))
    assert folder.finished_blocks() == 3


@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_damaged_block_breaks_no_chain_and_is_refused(tmp_path, block):
    folder = a_run(tmp_path, blocks=3)
    content = bytearray(folder.block_path(block).read_bytes())
    content[-1] ^= 1
    folder.block_path(block).write_bytes(content)
    assert RunFolder.open(tmp_path).finished_blocks() == 3
    refuse(folder.require_finished, f"{block:04d}.safetensors: changed or damaged")


def test_each_part_has_its_own_chain(tmp_path):
    folder = a_run(tmp_path, blocks=2)
    for block in range(2):
        folder.tower.save_block(parameters(block + 7), record(block))
    learned_anew(folder.tower, 0)
    assert (folder.finished_blocks(), folder.tower.finished_blocks()) == (2, 1)


def test_files_are_hashed_once(tmp_path, monkeypatch):
    a_run(tmp_path, blocks=3)
    folder, read = RunFolder.open(tmp_path), []
    original = chain.read_plain
    monkeypatch.setattr(chain, "read_plain", lambda path: read.append(path) or original(path))
    assert [folder.finished_blocks() for _ in range(4)] == [3] * 4 and len(read) == 3


def test_saving_a_block_reads_no_earlier_line_again(tmp_path, monkeypatch):
    """Else the last of many blocks would take as long as all before it."""
    folder, parsed, counts = a_run(tmp_path), [], []
    original = journal.json_object
    monkeypatch.setattr(journal, "json_object", lambda line: parsed.append(1) or original(line))
    for block in range(6):
        folder.save_block(parameters(block), record(block))
        counts.append(len(parsed))
    assert len({after - before for before, after in itertools.pairwise(counts)}) == 1
    assert [entry.block for entry in folder.records()] == list(range(6))


def test_a_copy_takes_over_only_what_follows_its_own_blocks(tmp_path):
    source, copy = a_run(tmp_path / "a", blocks=3), a_run(tmp_path / "b", blocks=2)
    learned_anew(copy, 1)
    own = copy.block_path(1).read_bytes()
    again = RunFolder.start(tmp_path / "b", Config(), IDENTITY, tmp_path / "a")
    assert again.finished_blocks() == 2 and again.block_path(1).read_bytes() == own
    copy.block_path(1).unlink()
    again = RunFolder.start(tmp_path / "b", Config(), IDENTITY, tmp_path / "a")
    assert again.finished_blocks() == 3 and again.records() == source.records()


def test_a_new_run_replaces_an_old_one(tmp_path):
    folder = a_run(tmp_path, blocks=2)
    folder.write_text("results.json", "{}")
    assert a_run(tmp_path).finished_blocks() == 0
    assert not (tmp_path / "results.json").exists() and folder.records() == []


def test_a_new_run_leaves_other_people_s_files(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    a_run(tmp_path, blocks=1)
    (tmp_path / "blocks" / "toy.txt").write_text("mine")
    a_run(tmp_path)
    assert all((tmp_path / name).read_text() == "mine" for name in ("notes.txt", "blocks/toy.txt"))


@pytest.mark.parametrize("failing", ["config.yaml", "run.json"])
def test_a_start_that_is_killed_leaves_no_run(tmp_path, monkeypatch, failing):
    a_run(tmp_path, blocks=2)
    original = RunFolder.write_text

    def killed(self, name, text):
        if name == failing:
            raise Killed
        original(self, name, text)

    monkeypatch.setattr(RunFolder, "write_text", killed)
    with pytest.raises(Killed):
        a_run(tmp_path)
    refuse(lambda: RunFolder.open(tmp_path), "no run here", str(tmp_path))
    monkeypatch.undo()
    assert a_run(tmp_path).finished_blocks() == 0


def kill_while_writing(monkeypatch):
    def half(handle):
        os.truncate(handle, 10)
        raise Killed

    monkeypatch.setattr(os, "fsync", half)


def kill_at_rename(suffix):
    def install(monkeypatch):
        original = os.replace

        def killed(source, target):
            if str(target).endswith(suffix):
                raise Killed
            return original(source, target)

        monkeypatch.setattr(os, "replace", killed)

    return install


LEFTOVER = f".lrquant-{'0a' * 16}.tmp"


@pytest.mark.parametrize(
    "kill",
    [kill_while_writing, kill_at_rename("blocks.jsonl"), kill_at_rename(".safetensors")],
    ids=["while writing", "before the record", "before the rename"],
)
def test_a_kill_while_a_block_is_saved_loses_that_block_only(tmp_path, monkeypatch, kill):
    folder = a_run(tmp_path, blocks=1)
    kill(monkeypatch)
    with pytest.raises(Killed):
        folder.save_block(parameters(1), record(1, final_loss=0.9))
    monkeypatch.undo()
    for name in (LEFTOVER, "p.tmp"):
        (folder.path / "blocks" / name).write_bytes(b"what a real kill, or a person, would leave")
    assert folder.finished_blocks() == 1 and folder.records() == [record(0)]
    with held(tmp_path):
        folder.save_block(parameters(1), record(1))
    assert folder.records() == [record(0), record(1)]
    assert len((tmp_path / "blocks.jsonl").read_text().splitlines()) == 2
    assert sorted(path.name for path in (tmp_path / "blocks").iterdir()) == [
        *("0000.safetensors", "0001.safetensors", "p.tmp")
    ]
    assert torch.equal(folder.load_block(1)["lwc.q.upper"], parameters(1)["lwc.q.upper"])


@pytest.mark.parametrize("name", ["blocks.jsonl", "results.json"])
def test_no_space(tmp_path, monkeypatch, name):
    folder = a_run(tmp_path, blocks=1)

    def full(handle):
        raise FULL

    monkeypatch.setattr(os, "fsync", full)
    refuse(
        lambda: folder.save_block(parameters(1), record(1)),
        *(str(tmp_path), "No space left", "free some space"),
    )
    refuse(lambda: folder.write_text(name, "x"), name, "No space left", str(tmp_path))
    assert folder.finished_blocks() == 1 and folder.records() == [record(0)]
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_log_that_cannot_be_written_is_no_reason_to_stop(tmp_path, monkeypatch, capsys):
    folder = a_run(tmp_path)
    monkeypatch.setattr(Journal, "claim_growing", lambda self, name: Path("/dev/full"))
    logger = logging.Logger("test")
    with folder.logging(logger, MemoryHandler(9)):
        logger.info("hello")
    assert capsys.readouterr().err == "" and logger.handlers == []


@pytest.mark.parametrize("kind", ["link", "link to nothing", "pipe"])
def test_a_log_that_became_something_else_is_not_written(tmp_path, monkeypatch, caplog, kind):
    """Between the check, which finds no link there, and the opening."""
    folder, mine = a_run(tmp_path / "run"), tmp_path / "mine"
    claim = Journal.claim_growing

    def claimed(self, name):
        path = claim(self, name)
        if kind == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to(mine)
        return path

    if kind == "link":
        mine.write_text("mine")
    monkeypatch.setattr(Journal, "claim_growing", claimed)
    logger, earlier = logging.getLogger("lrquant"), MemoryHandler(9)
    with folder.logging(logger, earlier):
        logger.info("hello")
    assert "run.log cannot be written" in caplog.text
    assert mine.read_text() == "mine" if kind == "link" else not mine.exists()


def test_the_log_gets_what_the_logger_says(tmp_path):
    folder = a_run(tmp_path)
    logger, earlier = logging.Logger("test", level=logging.INFO), MemoryHandler(9)
    logger.addHandler(earlier)
    logger.info("said zero")
    for word in ("one", "two"):
        with folder.logging(logger, earlier):
            logger.info("said %s", word)
            logger.debug("not said")
    logger.info("said three")
    lines = (tmp_path / "run.log").read_text().splitlines()
    assert [line.split()[-1] for line in lines] == ["zero", "one", "two"]
    assert logger.handlers == []


def test_a_path_that_cannot_be_a_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    refuse(lambda: a_run(tmp_path / "file"), str(tmp_path / "file"), "--output_dir")
    refuse(lambda: a_run(tmp_path / "file" / "run"), str(tmp_path / "file"), "--output_dir")
    assert (tmp_path / "file").read_text() == "mine"


def test_going_on_in_place(tmp_path):
    a_run(tmp_path, blocks=2)
    folder = RunFolder.start(tmp_path, Config(), IDENTITY, resume=tmp_path)
    assert folder.finished_blocks() == 2 and folder.config.model == "m"


def test_going_on_elsewhere_copies(tmp_path):
    source = a_run(tmp_path / "a", blocks=2)
    config = Config(model="m", output_dir="b")
    copy = RunFolder.start(tmp_path / "b", config, IDENTITY, resume=tmp_path / "a")
    assert copy.config == config and copy.records() == source.records()
    for index in range(2):
        assert copy.block_path(index).read_bytes() == source.block_path(index).read_bytes()
    copy.save_block(parameters(2), record(2))
    assert (copy.finished_blocks(), source.finished_blocks()) == (3, 2)


def test_a_copy_that_is_cut_off_holds_whole_blocks_only(tmp_path, monkeypatch):
    source = a_run(tmp_path / "a", blocks=3)
    original = os.replace

    def cut_off(source, target):
        if str(target).endswith("0001.safetensors"):
            raise FULL
        original(source, target)

    monkeypatch.setattr(os, "replace", cut_off)
    args = tmp_path / "b", Config(), IDENTITY, tmp_path / "a"
    refuse(
        lambda: RunFolder.start(*args), str(tmp_path / "a"), str(tmp_path / "b"), "No space left"
    )
    folder = RunFolder.open(tmp_path / "b")
    assert folder.finished_blocks() == 1 and folder.records() == [record(0)]
    assert folder.block_path(0).read_bytes() == source.block_path(0).read_bytes()
    monkeypatch.undo()
    assert RunFolder.start(*args).finished_blocks() == 3


@pytest.mark.parametrize(
    ("identity", "said"),
    [
        (altered("model", weights="abd"), ("model weights", "'abc'", "'abd'")),
        (altered("model", blocks=4), ("model blocks", "3", "4")),
        (altered("scheme", weight_bits=3), ("scheme weight_bits", "4", "3")),
        (altered("learning", let_lr=0.1), ("learning let_lr", "0.005", "0.1")),
        (altered("data", sha256="9"), ("data sha256", "'123'", "'9'")),
        (
            {**altered("data", sha256="9"), "calibration": "wikitext2/train, seed 3"},
            ("calibration", "seed 2", "seed 3"),
        ),
        ({**IDENTITY, "statistics": ["f00"]}, ("statistics", "[]", "['f00']")),
        ({**IDENTITY, "precision": "bfloat16"}, ("precision", "float32", "bfloat16")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_another_run_is_refused_with_the_difference_named(tmp_path, identity, said):
    a_run(tmp_path, blocks=1)
    start = lambda: RunFolder.start(tmp_path, Config(), identity, tmp_path)  # noqa: E731
    refuse(start, *said, str(tmp_path), "differs", "--output_dir")
    assert RunFolder.open(tmp_path).records() == [record(0)]


def test_only_the_words_about_the_data_may_differ(tmp_path):
    a_run(tmp_path)
    RunFolder.open(tmp_path).require_same({**IDENTITY, "calibration": "the same, said otherwise"})
    RunFolder.open(tmp_path).require_same({"model": IDENTITY["model"]})


def test_no_run_a_newer_run_and_a_damaged_run(tmp_path):
    refuse(lambda: RunFolder.open(tmp_path), "no run here", str(tmp_path))
    (tmp_path / "run.json").write_text('{"format": 2}')
    refuse(lambda: RunFolder.open(tmp_path), "format 2", "reads format 4")
    for content in ("", "{", "[]", '"x"', "[" * 100_000):
        (tmp_path / "run.json").write_text(content)
        refuse(lambda: RunFolder.open(tmp_path), "run.json")
    folder = a_run(tmp_path / "new")
    folder.write_text("run.json", '{"format": 5}')
    refuse(lambda: RunFolder.open(tmp_path / "new"), "format 5", "reads format 4")


def test_damaged_blocks_and_records(tmp_path):
    folder = a_run(tmp_path, blocks=2)
    content = folder.block_path(1).read_bytes()
    for damaged in (b"", content[:-3], b"x" * len(content)):
        folder.block_path(1).write_bytes(damaged)
        refuse(lambda: folder.load_block(1), "0001.safetensors", "--resume")
    folder.block_path(1).write_bytes(content)
    (tmp_path / "blocks.jsonl").write_text('{"block": 0')
    refuse(folder.records, "blocks.jsonl", "delete it")
    (tmp_path / "blocks.jsonl").unlink()
    unknown = {"seconds": 0, "peak_memory_bytes": 0}
    assert folder.records() == [dataclasses.replace(record(block), **unknown) for block in (0, 1)]
    folder.save_block(parameters(2), record(2))
    assert [entry.final_loss for entry in folder.records()] == [0.5, 0.5, 0.5]


DAMAGES = [b"", b"{", b"\xff", b"[" * 99_999, b'{"block": 0}\n', b"null\n"]


@pytest.mark.parametrize("content", DAMAGES, ids=lambda content: repr(content[:9]))
@pytest.mark.parametrize("listed", [False, True], ids=["changed", "written so"])
def test_damaged_records_come_anew_from_the_blocks(tmp_path, caplog, content, listed):
    folder = a_run(tmp_path, blocks=2)
    for part in (folder, folder.tower):
        for block in range(2):
            part.save_block(parameters(block), record(block))
        (part.path / "blocks.jsonl").write_bytes(content)
        if listed:
            name = (part.path / "blocks.jsonl").relative_to(tmp_path).as_posix()
            part.journal.write(name, content, damaged_too=True)
    folder.mend_records()
    unknown = {"seconds": 0, "peak_memory_bytes": 0}
    rebuilt = [dataclasses.replace(record(block), **unknown) for block in (0, 1)]
    assert folder.records() == folder.tower.records() == rebuilt
    said = [entry.getMessage() for entry in caplog.records]
    assert len(said) == 2 * bool(content or not listed)
    assert all("blocks.jsonl: damaged; its records are taken from the blocks" in x for x in said)
    folder.mend_records()
    assert len(caplog.records) == len(said)


def test_records_that_are_no_file_of_the_run_are_not_replaced(tmp_path):
    folder = a_run(tmp_path / "run", blocks=1)
    path = folder.path / "blocks.jsonl"
    path.unlink()
    (tmp_path / "mine").write_text("mine")
    path.symlink_to(tmp_path / "mine")
    folder.mend_records()
    refuse(lambda: folder.write_text("blocks.jsonl", "", True), "changed or damaged")
    assert path.is_symlink() and (tmp_path / "mine").read_text() == "mine"


def test_a_copy_of_a_run_with_damaged_records(tmp_path):
    source = a_run(tmp_path / "a", blocks=2)
    (source.path / "blocks.jsonl").write_text("{")
    copy = RunFolder.start(tmp_path / "b", Config(), IDENTITY, tmp_path / "a")
    assert [entry.final_loss for entry in copy.records()] == [0.5, 0.5]
    assert (source.path / "blocks.jsonl").read_text() == "{"


TEXTS = ["wikitext2", "..", ".", "...", "/", "../x", "..-x", "a/b", "a_b", "x" * 101, "x" * 102]


def test_what_is_adapted_to_a_text_called_model_is_not_the_run_s(tmp_path):
    folder = a_run(tmp_path, blocks=1)
    own, other = folder.load_block(0), {"x": torch.tensor(1.0)}
    folder.stage("adapted", "model").save(0, other, {})
    assert folder.learned(0).keys() == own.keys()
    folder.stage("tuned").save(0, other, {})
    assert folder.learned(0).keys() == own.keys() | other.keys()


def test_what_is_adapted_to_a_text_stays_where_such_is(tmp_path):
    folder = a_run(tmp_path, blocks=1)
    texts = [*TEXTS, "\u6587" * 100, "\u6587" * 101, "\udcff"]
    for number, text in enumerate(texts):
        folder.stage("adapted", text).save(0, {"x": torch.tensor(float(number))}, {})
    kept = [folder.stage("adapted", text).load(0)["x"].item() for text in texts]
    assert kept == list(range(len(texts)))
    files = {
        path.relative_to(tmp_path).parts for path in tmp_path.rglob("adapted/**/*.safetensors")
    }
    assert len(files) == len(texts) and all(len(parts) == 3 for parts in files)
    own = folder.stage("adapted", "wikitext2").path(0)
    assert own == tmp_path / "adapted/wikitext2/0000.safetensors"
    assert not (tmp_path / "0000.safetensors").exists()
    folder.stage("adapted", "..").forget()
    assert own.exists() and folder.finished_blocks() == 1


def test_results_keep_what_was_not_measured_again(tmp_path):
    folder = a_run(tmp_path)
    first = {"scheme": "W4A4", "perplexity": {"a": {"quantized": 1.0}, "b": {"quantized": 2.0}}}
    folder.add_results({**first, "tasks": {"piqa": {"acc": 0.5}}})
    merged = folder.add_results({"scheme": "W4A4", "perplexity": {"b": {"quantized": 3.0}}})
    assert merged["perplexity"] == {"a": {"quantized": 1.0}, "b": {"quantized": 3.0}}
    assert merged["tasks"] == {"piqa": {"acc": 0.5}}
    assert read_json(tmp_path / "results.json") == merged
