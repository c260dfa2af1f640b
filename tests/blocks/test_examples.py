"""Examples of what a model writes: greedy, before and after, and only where that is cheap."""

from __future__ import annotations

import pytest
import torch

from lrquant import quantize
from lrquant.blocks import examples, placement
from lrquant.blocks.examples import PROMPTS, write_examples


@pytest.fixture
def finished(make_model, tiny_tokenizer, data_dir, tmp_path):
    def make(family="llama"):
        return quantize(
            make_model(family),
            tokenizer=tiny_tokenizer,
            scheme="W3A16",
            output_dir=str(tmp_path / "run"),
            data_dir=str(data_dir),
            **{"nsamples": 2, "seqlen": 16, "epochs": 0, "precision": "float32", "report": False},
        )

    return make


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_they_are_what_the_models_write(finished, family, tiny_tokenizer):
    run = finished(family)
    texts = write_examples(run.workbench, run.folder)["examples"]
    assert [each["prompt"] for each in texts] == list(PROMPTS)
    assert write_examples(run.workbench, run.folder)["examples"] == texts
    ids = tiny_tokenizer(PROMPTS[1], return_tensors="pt")["input_ids"]
    module = run.load_model()
    for _ in range(examples.NEW_TOKENS):
        ids = torch.cat([ids, module(ids).logits[:, -1:].argmax(-1)], 1)
    assert texts[1]["quantized"] == tiny_tokenizer.decode(ids[0, -examples.NEW_TOKENS :])


def test_none_where_they_are_dear(finished, monkeypatch, caplog):
    pytest.importorskip("accelerate", reason="needs the extra lrquant[eval]")
    run = finished()
    caplog.set_level("INFO", "lrquant")
    monkeypatch.setattr(examples, "LARGEST_ON_CPU", 10)
    assert write_examples(run.workbench, run.folder) == {}
    assert "too long on a CPU" in caplog.text
    monkeypatch.setattr(examples, "LARGEST_ON_CPU", 10**12)
    whole = write_examples(run.workbench, run.folder)
    monkeypatch.setattr(placement, "free_memory", lambda device: 10)
    assert write_examples(run.workbench, run.folder) == {}
    assert (
        "no examples of what the model writes: the whole model needs 0.0 GB, with 2 blocks on"
        in (caplog.text)
    )
    monkeypatch.setattr(placement.Placement, "slow", False)
    assert write_examples(run.workbench, run.folder) == whole != {}
    assert caplog.text.count("the whole model needs 0.0 GB: 2 blocks on the disk") == 2


def test_none_where_the_first_device_is_too_small(finished, monkeypatch, caplog):
    run = finished()
    caplog.set_level("INFO", "lrquant")
    monkeypatch.setattr(placement, "free_memory", lambda device: 10)
    monkeypatch.setattr(placement, "free_room", lambda device: {0: 10, "cpu": 2**40})
    assert write_examples(run.workbench, run.folder) == {}
    assert "GB on cuda:0 at least" in caplog.text
