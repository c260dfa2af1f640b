"""Text that a model writes itself to be calibrated on: what it is, and that a run keeps it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from lrquant import pipeline, quantize
from lrquant.blocks import placement
from lrquant.blocks.generation import OwnText
from lrquant.blocks.materialize import materialize
from lrquant.blocks.placement import Placement
from lrquant.blocks.variants import full_precision
from lrquant.preflight.checks import preflight

COUNT, LENGTH = 5, 12


@pytest.fixture
def bench(make_model, make_bench):
    return make_bench(make_model("llama"))


def test_texts_are_as_long_as_asked_and_repeat(bench):
    first = OwnText(bench)(COUNT, LENGTH, 3, (1,))
    assert first.shape == (COUNT, LENGTH) and first.dtype == torch.int64
    assert (first[:, 0] == 1).all() and len(first.unique(dim=0)) == COUNT
    state = torch.random.get_rng_state()
    assert torch.equal(OwnText(bench)(COUNT, LENGTH, 3, (1,)), first)
    assert torch.equal(torch.random.get_rng_state(), state), "others' randomness stays"
    assert not torch.equal(OwnText(bench)(COUNT, LENGTH, 4, (1,)), first)
    without = OwnText(bench)(COUNT, LENGTH, 3, ())
    assert len(without[:, 0].unique()) > 1


def test_each_token_is_one_that_the_model_finds_likely(bench):
    """By top-k sampling, as the model's own settings say, no other is drawn, nor an end."""
    module = materialize(bench, full_precision(bench))
    module.generation_config.top_k = 3
    writer = OwnText(bench)
    writer.__dict__["_module"] = module
    ids = writer(COUNT, LENGTH, 0, (1,))
    logits = module(ids).logits[:, :-1]
    logits[..., module.generation_config.eos_token_id] = float("-inf")
    likely = logits.topk(3).indices
    assert (likely == ids[:, 1:, None]).any(-1).all()


@pytest.fixture
def learn(make_model, tiny_tokenizer, tmp_path):
    def run(name="run", **settings):
        settings = {"calib_dataset": "self", "nsamples": 4, "seqlen": LENGTH, **settings}
        return quantize(
            make_model("llama"),
            "W4A16",
            tokenizer=tiny_tokenizer,
            output_dir=str(tmp_path / name),
            **{"epochs": 1, "precision": "float32", "report": False, **settings},
        )

    return run


def test_a_run_keeps_what_was_written(learn, tmp_path, monkeypatch):
    run = learn(tune=True, tune_nsamples=3, lwc=True)
    texts = run.folder.written_texts()
    assert sorted(texts) == [f"3x{LENGTH}-seed3", f"4x{LENGTH}-seed2"]
    log = (tmp_path / "run" / "run.log").read_text()
    assert f"calibration self, 4 x {LENGTH} = {4 * LENGTH} tokens, seed 2" in log
    monkeypatch.setattr(OwnText, "_written", None)
    same = {"tune": True, "tune_nsamples": 3, "lwc": True, "resume": str(run.folder.path)}
    learn(**same)
    moved = learn("moved", **same)
    assert moved.folder.written_texts().keys() == texts.keys()


def test_written_again_it_is_the_same(learn):
    run = learn()
    before = (run.folder.path / "calibration.safetensors").read_bytes()
    (run.folder.path / "calibration.safetensors").unlink()
    learn(resume=str(run.folder.path))
    assert (run.folder.path / "calibration.safetensors").read_bytes() == before


def test_beside_other_sets(learn, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a b c d e f g h i j k l m n o p " * 20)
    run = learn(calib_dataset=f"{text},self", nsamples=5)
    assert list(run.folder.written_texts()) == [f"2x{LENGTH}-seed2"]
    log = (tmp_path / "run" / "run.log").read_text()
    assert "3 of " in log and "2 of self" in log


def test_the_preflight_writes_nothing(make_model, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(OwnText, "_written", None)
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_config(make_model("llama").config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    asked = {"model": str(folder), "scheme": "W4A16", "calib_dataset": "self", "nsamples": 4}
    asked |= {"seqlen": LENGTH, "output_dir": str(tmp_path / "run")}
    few, many = (
        preflight({**asked, "tune": True, "tune_nsamples": count}).memory for count in (2, 60_000)
    )
    # beside learning, which needs what it did: both begin at what this process holds at the time
    grown = (many.tuning - many.learning) - (few.tuning - few.learning)
    assert grown > 90e6, "the hidden states of the stage's own samples count"
    done = preflight(asked)
    (said,) = [f for f in done.findings if f.what == "calibration"]
    assert said.state == "ok" and "self: written before learning" in said.text
    assert done.memory is not None and done.seconds is not None


def test_a_model_that_does_not_fit_writes_the_same(learn, tmp_path, monkeypatch, caplog):
    """Spread over places, which the pre-flight says; it is let go of before blocks are learned."""
    pytest.importorskip("accelerate", reason="needs the extra lrquant[eval]")
    (texts,) = learn().folder.written_texts().values()
    monkeypatch.setattr(placement, "free_memory", lambda device: 0)
    remove, learn_model, removed = Placement.remove, pipeline.learn_model, []
    monkeypatch.setattr(Placement, "remove", lambda own: removed.append(own) or remove(own))

    def after_writing(*own, **rest):
        assert [set(each.blocks.values()) for each in removed] == [{"disk"}]
        return learn_model(*own, **rest)

    monkeypatch.setattr(pipeline, "learn_model", after_writing)
    with caplog.at_level("INFO", logger="lrquant"):
        spread = learn("spread").folder.written_texts()
    assert torch.equal(*spread.values(), texts)
    said = "the whole model for calibration set self needs 0.0 GB: 2 blocks on the disk"
    assert said in caplog.text
