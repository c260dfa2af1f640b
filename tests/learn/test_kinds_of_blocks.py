"""Blocks of several kinds in one model: learned, resumed, tuned in windows, estimated, reported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lrquant import quantize
from lrquant.config.choices import KINDS
from lrquant.model.loading import from_module
from lrquant.preflight.checks import preflight
from lrquant.runs.folder import RunFolder

HYBRIDS = ("qwen3_5", "granitemoehybrid", "lfm2", "nemotron_h", "olmo_hybrid", "gemma4")
HYBRIDS += ("gemma3n",)
SETTINGS = {"scheme": "W4A4", "lwc": True, "let": True, "let_sites": KINDS, "epochs": 1}
SETTINGS |= {"let_init": 1.0}


class Killed(BaseException):
    """As abrupt as a kill can be made within one process."""


@pytest.fixture(params=HYBRIDS)
def model(request, make_model):
    return make_model(request.param)


def learn(model, ids, folder: Path, **settings):
    defaults = {**SETTINGS, "precision": "float32", "report": False}
    return quantize(model, calibration=ids, output_dir=str(folder), **{**defaults, **settings})


def learned(folder: Path) -> dict[str, bytes]:
    """The learned tensors' bytes, without the header that says of which run they are."""
    files = {path.name: path.read_bytes() for path in sorted((folder / "blocks").iterdir())}
    return {name: text[8 + int.from_bytes(text[:8], "little") :] for name, text in files.items()}


def test_a_killed_run_goes_on_to_the_same_bytes(model, token_ids, tmp_path, monkeypatch):
    ids, save = token_ids(2, 12), RunFolder.save_block
    learn(model, ids, tmp_path / "whole")

    def saving(self, parameters, record):
        save(self, parameters, record)
        raise Killed

    monkeypatch.setattr(RunFolder, "save_block", saving)
    with pytest.raises(Killed):
        learn(model, ids, tmp_path / "killed")
    monkeypatch.undo()
    assert len(learned(tmp_path / "killed")) == 1
    run = learn(model, ids, tmp_path / "killed", resume=str(tmp_path / "killed"))
    assert learned(tmp_path / "killed") == learned(tmp_path / "whole")
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    cached, anew = (run.load_model().generate(ids, use_cache=c, **settings) for c in (True, False))
    assert torch.equal(cached, anew), "what a cache holds of each kind of block is not its state"


@pytest.mark.parametrize("name", ["qwen3_5", "nemotron_h", "gemma4", "gemma3n"])
def test_a_window_over_blocks_of_several_kinds_learns_all(name, make_model, token_ids, tmp_path):
    """In half precision, with its report, of which each block's matrices are another's."""
    model = make_model(name)
    ids, count = token_ids(2, 12), model.config.num_hidden_layers
    run = learn(model, ids, tmp_path, window=count, epochs=2, precision="bfloat16", report=True)
    assert all(record.final_loss <= record.initial_loss for record in run.records)
    page, read = (tmp_path / "report.html").read_text(), from_module(model)
    names = [matrix.name for index in range(count) for matrix in read.matrices(index)]
    assert all(name in page for name in names)
    assert torch.isfinite(run.load_model()(ids).logits).all()


def test_each_kind_is_estimated(model, tmp_path):
    settings = {**SETTINGS, "nsamples": 2, "seqlen": 12, "precision": "float32"}
    found = preflight(
        {**settings, "save_dir": str(tmp_path / "saved"), "format": "lrquant"}, from_module(model)
    )
    assert [cost.blocks for cost in found.costs] == [(i,) for i in range(len(found.costs))]
    assert len(found.costs) == model.config.num_hidden_layers
    assert found.checkpoint.total > 0 and found.memory.peak > 0
