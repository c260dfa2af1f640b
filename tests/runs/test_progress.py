"""Progress while a run is under way: on a terminal, in a file, in TensorBoard."""

from __future__ import annotations

import dataclasses
import io
import re
import sys

import pytest
from rich.console import Console
from rich.segment import Segment
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lrquant import LRQuantError, evaluate, quantize
from lrquant.learn import model as learning
from lrquant.runs.bars import BarProgress
from lrquant.runs.folder import BlockRecord, RunFolder
from lrquant.runs.progress import Progress, Together
from lrquant.runs.tensorboard import TensorBoardLog

RECORD = BlockRecord(0, 2.0, 1.0, [1.5, 1.0], 3.0, 5_000_000, [])


@pytest.fixture
def screen():
    """A terminal that keeps what is written to it."""
    return Console(file=io.StringIO(), force_terminal=True, width=200, color_system=None)


@pytest.fixture
def learn(make_model, token_ids, tmp_path):
    def run(folder="run", progress=None, **settings):
        defaults = {"epochs": 2, "precision": "float32", "report": False}
        return quantize(
            make_model("llama", num_hidden_layers=3),
            "W4A16",
            calibration=token_ids(4, 16),
            output_dir=str(tmp_path / folder),
            progress=progress,
            **(defaults | settings),
        )

    return run


def shown(bars):
    """The line of the first bar, as it stands now."""
    console = Console(width=200, color_system=None)
    lines = console.render_lines(bars._bars.get_renderable(), pad=False)
    return "".join(segment.text for segment in Segment.simplify(lines[0]))


def test_block_epoch_loss_time_and_memory(screen):
    bars = BarProgress(screen)
    with bars.blocks(30, 20, 128, lambda: 3_200_000_000):
        bars.stepper(0)(128, 0.25)
        bars.finished(0, RECORD)
        bars.stepper(1)(129, 0.12345)
        line = shown(bars)
    assert "1/30 blocks" in line and "block 1, epoch 2/20" in line
    assert "loss 0.1235" in line or "loss 0.1234" in line
    assert "peak 3.2 GB" in line and "left" in line


def test_nothing_is_cut_off_on_a_terminal_of_80_columns(screen):
    bars = BarProgress(screen)
    narrow = Console(width=80, color_system=None)
    with bars.blocks(30, 20, 128, lambda: 3_200_000_000):
        bars.stepper(11)(128, 0.25)
        lines = narrow.render_lines(bars._bars.get_renderable(), pad=False)
    text = " ".join("".join(segment.text for segment in line) for line in lines)
    assert "…" not in text and "0/30 blocks" in text and "0:00:00 left" in text
    words = " ".join(text.split())
    for said in ("block 11,", "epoch 1/20,", "loss 0.25,", "3.2 GB"):
        assert said in words


def test_blocks_that_were_learned_before_are_not_reckoned_as_speed(screen):
    bars = BarProgress(screen)
    with bars.blocks(4, 2, 5, lambda: 0):
        (task,) = bars._bars.tasks
        assert (task.total, task.completed) == (40, 0)
        for block in range(3):
            bars.finished(block, None)
        assert (task.total, task.completed) == (10, 0) and "3/4 blocks" in shown(bars)
        bars.stepper(3)(4, 1.0)
        assert task.completed == 4
        bars.finished(3, RECORD)
        assert task.finished


def test_nothing_is_shown_where_it_is_no_terminal(learn):
    console = Console(file=io.StringIO(), width=100)
    learn(progress=BarProgress(console))
    assert console.file.getvalue() == ""
    terminal = Console(file=io.StringIO(), force_terminal=True, width=200)
    learn("again", progress=BarProgress(terminal))
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.file.getvalue())
    assert "learning" in plain and "blocks" in plain


class Told(Progress):
    """Keeps what it is told."""

    def __init__(self):
        self.steps, self.done, self.results, self.closed = [], [], [], 0

    def stepper(self, block, together=1):
        return lambda step, loss: self.steps.append((block, step, loss))

    def finished(self, block, record):
        self.done.append((block, record))

    def measured(self, results):
        self.results.append(results)

    def close(self):
        self.closed += 1


def test_a_run_tells_all_of_it(learn):
    first, second = Told(), Told()
    run = learn(progress=Together((first, second)))
    assert first.steps == second.steps and first.done == second.done
    assert [(block, step) for block, step, _ in first.steps] == [
        (block, step) for block in range(3) for step in range(1, 9)
    ]
    assert [record for _, record in first.done] == run.records
    assert first.closed == second.closed == 1
    for record in run.records:
        losses = [loss for block, _, loss in first.steps if block == record.block]
        assert sum(losses[4:]) / 4 == pytest.approx(record.epoch_losses[1])


def scalars(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_a_log_for_tensorboard(learn, tmp_path):
    told = Told()
    run = learn(log_dir=str(tmp_path / "log"), progress=told)
    found = scalars(tmp_path / "log")
    steps = [(block * 8 + step, pytest.approx(loss)) for block, step, loss in told.steps]
    assert found["learning/loss"] == steps and len(steps) == 24
    for name in ("initial_loss", "final_loss", "seconds", "peak_memory_bytes"):
        values = [(r.block, pytest.approx(getattr(r, name))) for r in run.records]
        assert found[f"block/{name}"] == values
    resumed = learn(log_dir=str(tmp_path / "later"), resume=str(run.folder.path))
    assert resumed.records == run.records and scalars(tmp_path / "later") == {}


def test_measures_for_tensorboard(make_model, tiny_tokenizer, tmp_path):
    for split in ("validation", "test"):
        (tmp_path / "data" / "wikitext2").mkdir(parents=True, exist_ok=True)
        text = " ".join(f"{split} {number * number}" for number in range(60))
        (tmp_path / "data" / "wikitext2" / f"{split}.txt").write_text(text)
    run = quantize(
        make_model("llama"),
        "W4A4",
        tokenizer=tiny_tokenizer,
        output_dir=str(tmp_path / "run"),
        data_dir=str(tmp_path / "data"),
        log_dir=str(tmp_path / "log"),
        **{"nsamples": 2, "seqlen": 16, "epochs": 0, "limit": 2, "report": False},
        **{"ppl": ("wikitext2",), "agreement": ("wikitext2",), "precision": "float32"},
    )
    found = scalars(tmp_path / "log")
    perplexity = run.results["perplexity"]["wikitext2"]
    assert found["perplexity/wikitext2 quantized"] == [(0, pytest.approx(perplexity["quantized"]))]
    kl = run.results["agreement"]["wikitext2"]["quantized"]["kl_mean"]
    assert found["agreement/wikitext2 quantized kl_mean"] == [(0, pytest.approx(kl))]


def test_tensorboard_that_is_not_installed(learn, tmp_path, monkeypatch):
    for name in ("torch.utils.tensorboard", "torch.utils.tensorboard.writer"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setattr(learning, "learn_blocks", lambda *a: pytest.fail("learned already"))
    with pytest.raises(LRQuantError, match=r"pip install 'lrquant\[tensorboard\]'") as error:
        learn(log_dir=str(tmp_path / "log"))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_a_log_that_cannot_be_written(learn, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(LRQuantError, match=r"--log_dir .*file.*use another folder"):
        learn(log_dir=str(tmp_path / "file" / "log"))
    assert not (tmp_path / "run").exists()


def test_the_log_does_not_change_the_run(learn, tmp_path):
    run, other = learn("a"), learn("b", log_dir=str(tmp_path / "log"))
    for block in range(3):
        paths = [RunFolder(each.folder.path).block_path(block) for each in (run, other)]
        assert paths[0].read_bytes() == paths[1].read_bytes()


def test_scores_of_tasks_are_logged_once(tmp_path):
    piqa = {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "piqa"}
    base = {"acc,none": 0.6, "acc_stderr,none": 0.1, "alias": "piqa"}
    entry = {"data": "words", "part_of": "more words", "quantized": piqa}
    log = TensorBoardLog(str(tmp_path / "log"))
    log.measured({"tasks": {"piqa": entry}})
    log.measured({"tasks": {"piqa": {**entry, "base": base, "differences": {"base": {}}}}})
    log.close()
    found = scalars(tmp_path / "log")
    assert found["tasks/piqa quantized acc"] == [(0, pytest.approx(0.5))]
    assert found["tasks/piqa base acc"] == [(0, pytest.approx(0.6))]
    assert set(found) == {
        f"tasks/piqa {side} {name}"
        for side in ("quantized", "base")
        for name in ("acc", "acc_stderr")
    }


def test_a_model_and_a_checkpoint_are_logged_too(model_folder, tmp_path):
    (tmp_path / "data" / "wikitext2").mkdir(parents=True)
    for split in ("validation", "test"):
        text = " ".join(f"{split} {number * number}" for number in range(60))
        (tmp_path / "data" / "wikitext2" / f"{split}.txt").write_text(text)
    model = str(model_folder("llama"))
    few = {"data_dir": str(tmp_path / "data"), "seqlen": 16, "precision": "float32"}
    places = {"output_dir": str(tmp_path / "run"), "save_dir": str(tmp_path / "saved")}
    quantize(model, "W4A16", nsamples=2, epochs=0, report=False, **few, **places)
    few |= {"agreement": ("wikitext2",), "limit": 2, "compare": model}
    for target, own in ((model, "full_precision"), (places["save_dir"], "quantized")):
        log = tmp_path / f"log-{own}"
        results = evaluate(target, log_dir=str(log), **few)
        found = scalars(log)
        for variant in (own, "base"):
            value = pytest.approx(results["perplexity"]["wikitext2"][variant])
            assert found[f"perplexity/wikitext2 {variant}"] == [(0, value)]
        kl = pytest.approx(results["agreement"]["wikitext2"][own]["kl_mean"], abs=1e-6)
        assert found[f"agreement/wikitext2 {own} kl_mean"] == [(0, kl)]


@pytest.mark.parametrize(
    ("losses", "best", "outcome"),
    [
        ((2.0, 1.24), 3, "-38 %"),
        ((2.0, 1.99), 1, "-0.5 %"),
        ((2.0, 2.5), 1, "+25 %"),
        ((2.0, 2.0), 0, "kept the start"),
        ((2.0, 1.0), None, "-50 %"),
        ((0.0, 0.0), 1, ""),
        ((float("nan"), 1.0), 1, ""),
        ((1.0, float("inf")), 1, ""),
    ],
)
def test_what_learning_did_to_a_block(losses, best, outcome):
    numbers = {"block": 0, "seconds": 1.0, "peak_memory_bytes": 1, "non_finite": []}
    losses = dict(zip(("initial_loss", "final_loss"), losses, strict=True))
    record = BlockRecord(**numbers, **losses, epoch_losses=[1.0], best_epoch=best)
    assert record.outcome == outcome
    assert dataclasses.replace(record, epoch_losses=[]).outcome == ""
