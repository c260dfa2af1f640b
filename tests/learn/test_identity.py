"""A run's identity: which other settings are those of another run."""

from __future__ import annotations

import json

import pytest
import torch

from lrquant import LRQuantError, quantize
from lrquant.learn.identity import gone_on_elsewhere
from lrquant.runs.sameness import difference, digest


@pytest.fixture
def learn(make_model, token_ids, tmp_path):
    def run(*patterns: str, **settings):
        return quantize(
            make_model("llama"),
            "W4A16",
            calibration=token_ids(2, 12),
            scheme_for=patterns,
            output_dir=str(tmp_path / "run"),
            **{"epochs": 1, "precision": "float32", "report": False, **settings},
        )

    return run


def test_patterns_in_another_order_are_another_run(learn, tmp_path):
    """The last that fits counts, so that their order says which bits a matrix has."""
    patterns = "layers.0=W8A16", "mlp.down_proj=W3A16"
    learn(*patterns)
    resume = str(tmp_path / "run")
    learn(*patterns, resume=resume)
    with pytest.raises(LRQuantError, match=r"its schemes differs: the run has \['layers\.0=W8A16"):
        learn(*reversed(patterns), resume=resume)
    with pytest.raises(LRQuantError, match="its schemes differs"):
        learn(patterns[0], resume=resume)


def test_how_it_was_learned_is_told_by_these_names_in_this_order(learn, tmp_path):
    """So that a run of an earlier version goes on."""
    learn(batch_size=2, wd=0.5, window=2)
    learning = json.loads((tmp_path / "run" / "run.json").read_text())["learning"]
    assert list(learning.items()) == [
        *(("epochs", 1), ("weight_decay", 0.5), ("loss", "mse+nlc"), ("window", 2)),
        *(("two_branch", False), ("dynamic_weights", False), ("ema_init", "first")),
        *(("keep_best", True), ("batch_size", 2)),
    ]


def test_a_run_that_goes_on_with_other_threads_says_so(learn, tmp_path, caplog):
    learn()
    path = tmp_path / "run" / "run.json"
    begun = json.loads(path.read_text())["begun_on"]
    assert begun == {
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
    (tmp_path / "run" / "blocks" / "0001.safetensors").unlink()
    learn(resume=str(tmp_path / "run"))
    assert "last digits" not in caplog.text
    assert gone_on_elsewhere(begun, begun) is None and gone_on_elsewhere(None, begun) is None
    said = gone_on_elsewhere({**begun, "threads": 99}, begun)
    assert said is not None and f"threads {begun['threads']} in place of 99: " in said


def test_another_number_of_threads_is_no_other_run():
    run = {"model": {"weights": "x"}, "begun_on": {"device": "cpu", "threads": 1}}
    other = {**run, "begun_on": {"device": "cpu", "threads": 2}}
    assert difference(run, other) is None and digest(run) == digest(other)
    assert difference(run, {**run, "model": {"weights": "y"}}) is not None
