"""Token ids and tokenizers that are not the model's are refused before anything is learned."""

from __future__ import annotations

import copy

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lrquant import LRQuantError, evaluate, quantize
from lrquant.data.vocabulary import embedding_rows, strange_tokenizer
from lrquant.model.loading import from_module
from lrquant.preflight.checks import preflight

SETTINGS = {"precision": "float32", "epochs": 0, "report": False, "nsamples": 2, "seqlen": 8}


def other_tokenizer(tokens):
    words = {f"w{i}": i for i in range(tokens - 1)} | {"<unk>": tokens - 1}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


@pytest.fixture
def text(tmp_path):
    def make(*numbers):
        path = tmp_path / "text.txt"
        path.write_text(" ".join(f"w{number}" for number in numbers))
        return str(path)

    return make


@pytest.mark.parametrize("token", [264, -1, 10**12])
def test_given_ids_beyond_the_embedding(make_model, tmp_path, token_ids, token):
    ids = token_ids(3, 8)
    ids[1, 5] = token
    with pytest.raises(LRQuantError, match=rf"token id {token} in sample 1.*ids 0 to 263"):
        quantize(
            make_model("llama"),
            "W8A16",
            calibration=ids,
            output_dir=str(tmp_path / "run"),
            **SETTINGS,
        )
    assert not (tmp_path / "run").exists()


def test_the_largest_id_and_the_smallest_are_taken(make_model, tmp_path, token_ids):
    ids = token_ids(2, 8)
    ids[0, :2] = torch.tensor([0, 263])
    run = quantize(
        make_model("llama"), "W8A16", calibration=ids, output_dir=str(tmp_path / "run"), **SETTINGS
    )
    assert len(run.records) == 2


def test_no_samples_are_refused(make_model, tmp_path):
    ids = torch.zeros((0, 8), dtype=torch.int64)
    with pytest.raises(LRQuantError, match="no token"):
        quantize(
            make_model("llama"),
            "W8A16",
            calibration=ids,
            output_dir=str(tmp_path / "run"),
            **SETTINGS,
        )


def test_a_larger_tokenizer_is_refused_where_its_ids_occur(
    make_model, model_folder, text, tmp_path
):
    folder = model_folder("llama")
    other_tokenizer(400).save_pretrained(folder)
    settings = {**SETTINGS, "output_dir": str(tmp_path / "run")}
    rare = text(*range(100), 300, *range(100))
    with pytest.raises(LRQuantError, match=r"token id 300.*this one has 400 tokens"):
        quantize(folder, "W8A16", calib_dataset=rare, **{**settings, "nsamples": 200})
    with pytest.raises(LRQuantError, match="token id 300"):
        evaluate(str(folder), ppl=(rare,), seqlen=8, device="cpu")
    done = preflight({"model": str(folder), "calib_dataset": rare, "ppl": (rare,), **settings})
    assert {finding.what for finding in done.failed} >= {"evaluation"}
    assert any(finding.what == "tokenizer" for finding in done.findings)
    common = text(*range(200))
    quantize(folder, "W8A16", calib_dataset=common, **settings)


@pytest.mark.parametrize(
    ("tokens", "strange"),
    [(264, False), (250, False), (265, False), (280, False), (200, True), (400, True), (8, True)],
)
def test_padding_and_a_few_tokens_more_are_normal(make_model, caplog, tokens, strange):
    model = from_module(make_model("llama"), other_tokenizer(tokens))
    assert embedding_rows(model) == 264
    said = strange_tokenizer(model)
    assert (said is not None) == strange
    assert said is None or f"{tokens} tokens, the embedding 264 rows" in said


def test_the_run_warns_of_a_strange_tokenizer(model_folder, text, tmp_path, caplog):
    folder = model_folder("llama")
    other_tokenizer(100).save_pretrained(folder)
    settings = {**SETTINGS, "output_dir": str(tmp_path / "run")}
    quantize(folder, "W8A16", calib_dataset=text(*range(80)), **settings)
    assert any("is it the model's own" in message for message in caplog.messages)


def test_a_model_without_a_tokenizer_has_none_to_doubt(make_model):
    assert strange_tokenizer(from_module(copy.deepcopy(make_model("opt")))) is None
