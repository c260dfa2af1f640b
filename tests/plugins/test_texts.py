"""A set of text of another package, the one of the page: learned and measured on by its name."""

from __future__ import annotations

import pytest

import lrquant
from lrquant import LRQuantError
from lrquant.data.declared import TextSource, text_sources
from lrquant.data.texts import load_text

PAGE = "add-a-text.md"
QUICK = {"nsamples": 4, "seqlen": 16, "epochs": 0, "precision": "float32", "report": False}


def test_a_run_takes_it(installed, make_model, tiny_tokenizer, data_dir, tmp_path):
    installed(PAGE)
    run = lrquant.quantize(
        make_model("llama"),
        "W4A16",
        tokenizer=tiny_tokenizer,
        calib_dataset="help-desk,wikitext2",
        ppl="help-desk",
        data_dir=str(data_dir),
        output_dir=str(tmp_path / "run"),
        limit=2,
        **QUICK,
    )
    said = run.folder.identity["calibration"]
    assert "2 of help-desk/train (messages, no chat template" in said
    measured = run.results["perplexity"]["help-desk"]
    assert measured["text"].startswith("help-desk/test") and measured["quantized"] > 1


def test_its_splits_and_its_name(installed):
    with pytest.raises(LRQuantError, match="unknown data set 'help-desk'"):
        load_text("help-desk", ("train",), None, None)
    installed(PAGE)
    assert len(load_text("help-desk", ("validation", "test"), None, None).documents) == 10
    with pytest.raises(LRQuantError, match="text help-desk: has no validation split"):
        load_text("help-desk", ("validation",), None, None)
    with pytest.raises(LRQuantError, match=r"the nearest is help-desk: known are .*help-desk"):
        load_text("help-dsk", ("train",), None, None)


def test_two_of_one_name_and_documents_of_no_kind(monkeypatch):
    twice = [TextSource("same", lambda split: [3]), TextSource("same", lambda split: [])]
    monkeypatch.setattr("lrquant.data.declared.declarations_of_others", lambda *asked: twice)
    text_sources.cache_clear()
    with pytest.raises(LRQuantError, match="'same': declared by two packages"):
        text_sources()
    twice.pop()
    with pytest.raises(LRQuantError, match="text same: int in place 1"):
        load_text("same", ("train",), None, None)
    text_sources.cache_clear()
