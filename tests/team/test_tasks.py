"""Tasks that two processes answer: the scores of one, and one line where one of them fails."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

from lrquant import evaluate, quantize
from lrquant.runs.folder import RunFolder

pytest.importorskip("lm_eval", reason="needs the extra lrquant[eval]")
SCRIPT = Path(__file__).with_name("tasks.py")
SETS = Path(__file__).parents[1] / "measures" / "conftest.py"
SHARED = {"precision": "float32", "device": "cpu", "task_batch_size": "3"}


@pytest.fixture
def sets(tmp_path):
    """A folder with the set of one task."""
    spec = importlib.util.spec_from_file_location("sets", SETS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows = [
        {"goal": f"count to {n}", "sol1": f"say {n * 37 % 91}", "sol2": f"say {n}.", "label": n % 2}
        for n in range(2, 25)
    ]
    module.save(tmp_path / "sets", "piqa/plain_text", rows)
    return tmp_path / "sets"


def test_two_processes_score_what_one_does(
    start, model_folder, token_ids, sets, tmp_path, monkeypatch
):
    """One of three models is too large for each: the first alone has it, spread over places."""
    run = tmp_path / "run"
    settings = {**SHARED, "epochs": 1, "report": False, "output_dir": str(run)}
    quantize(model_folder("llama"), "W4A4", calibration=token_ids(2, 16), **settings)
    words = ["--tasks", "piqa", "--data-dir", sets, "--task-batch-size", "3", "--device", "cpu"]
    words += ["--precision", "float32", "--compare"]
    alone = evaluate(str(run), tasks="piqa", data_dir=str(sets), compare=True, **SHARED)["tasks"]
    assert {"quantized", "full_precision", "round_to_nearest"} < set(alone["piqa"])
    shutil.rmtree(run / "tasks")
    (run / "results.json").unlink()
    monkeypatch.setenv("LARGE", "1")
    assert start(2, SCRIPT, "evaluate", run, *words) == (0, [])
    assert RunFolder.open(run).results()["tasks"] == alone
    assert len(list((run / "tasks").iterdir())) == 3
    log = (run / "run.log").read_text()
    assert log.count("tasks: the model is too large to be whole in each of 2 processes") == 1
    assert log.count("GB: 2 blocks on the disk") == 1 and not list(run.glob("whole-*"))


def test_a_checkpoint_too_large_for_each_is_the_first_ones(
    start, model_folder, token_ids, sets, data_dir, tmp_path, monkeypatch
):
    """It is measured by that one alone, spread over places; a text of the other model by both."""
    folder, settings = (
        tmp_path / "saved",
        {**SHARED, "epochs": 0, "report": False, "format": "lrquant"},
    )
    settings |= {"output_dir": str(tmp_path / "run"), "save_dir": str(folder)}
    model = model_folder("llama")
    quantize(model, "W4A4", calibration=token_ids(2, 16), **settings)
    shutil.move(Path(data_dir) / "wikitext2", sets / "wikitext2")
    words = ["--tasks", "piqa", "--data-dir", sets, "--task-batch-size", "3", "--device", "cpu"]
    words += ["--precision", "float32", "--compare", model, "--agreement", "wikitext2"]
    words += ["--seqlen", "24", "--limit", "6"]
    results = []
    for size in (1, 2):
        if size > 1:
            monkeypatch.setenv("SMALL", "1")
        place = tmp_path / f"of-{size}"
        assert start(size, SCRIPT, "evaluate", folder, *words, "--output-dir", place) == (0, [])
        results.append(RunFolder(place).results())
    one, two = results
    for kind in ("agreement", "tasks"):
        assert two[kind] == one[kind] != {}


def test_a_process_that_fails_ends_both_with_one_line(
    start, model_folder, sets, tmp_path, monkeypatch
):
    monkeypatch.setenv("FAILING", "1")
    words = ["--tasks", "piqa", "--data-dir", sets, "--device", "cpu"]
    code, lines = start(2, SCRIPT, "evaluate", model_folder("llama"), *words)
    assert code != 0 and lines == ["lrquant: rank 1 of 2: no answer; ask again"]
