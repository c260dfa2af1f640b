"""Perplexity: that of transformers and plain cross-entropy, at any window, limit and variant."""

from __future__ import annotations

import dataclasses
import logging
import math

import pytest
import torch

from lrquant import LRQuantError, evaluate, quantize
from lrquant.blocks.inputs import BlockInputs
from lrquant.blocks.materialize import materialize
from lrquant.blocks.plan import Plan
from lrquant.blocks.variants import full_precision, unlearned
from lrquant.config.config import Config
from lrquant.config.scheme import FLOATING_POINT, Scheme
from lrquant.config.schemes import Schemes
from lrquant.data.samples import Samples
from lrquant.measures.evaluation import evaluation, texts
from lrquant.measures.evaluation.evaluation import Evaluation, score_text
from lrquant.measures.perplexity import MEASURE
from lrquant.measures.scoring import predictions
from lrquant.measures.subjects import subject as subjects
from lrquant.measures.subjects.subject import BlockSubject
from lrquant.model.loading import from_module
from lrquant.runs.progress import Progress

TEXT = " ".join(f"{number * number} is the square of {number}." for number in range(40))


@pytest.fixture
def data_dir(tmp_path):
    folder = tmp_path / "data"
    for name in ("wikitext2", "ptb"):
        (folder / name).mkdir(parents=True)
        for split in ("validation", "test"):
            (folder / name / f"{split}.txt").write_text(f"{name} {split}. {TEXT}")
    return folder


@torch.no_grad()
def straightforward(model, windows):
    """exp of the mean over all predicted tokens, one window at a time, in float64."""
    losses = []
    for window in windows:
        logits = model(window[None]).logits[0, :-1].double()
        losses.append(torch.nn.functional.cross_entropy(logits, window[1:], reduction="none"))
    return math.exp(torch.cat(losses).mean())


def windows_of(text, tokenizer, size, limit=-1):
    ids = torch.tensor(tokenizer(text).input_ids)
    windows = ids[: len(ids) // size * size].view(-1, size)
    return windows[:limit] if limit > 0 else windows


def under(bench, scheme):
    return dataclasses.replace(bench, plan=Plan(Schemes(scheme)))


def measure(bench, windows, scheme=FLOATING_POINT):
    samples = Samples(windows, "text", "test", "", "a text")
    subject = BlockSubject("full_precision", under(bench, scheme))
    (scored,) = score_text([MEASURE], [("round_to_nearest", subject)], samples, Progress())
    return scored.scores["round_to_nearest"].perplexity


def texts_read(config, model):
    return Evaluation(config).read(model).texts


@pytest.mark.parametrize(("size", "limit"), [(2, 30), (7, -1), (32, 1), (32, 1000), (64, 5)])
def test_full_precision_equals_transformers(
    model_folder, make_model, tiny_tokenizer, data_dir, size, limit
):
    settings = {"data_dir": str(data_dir), "seqlen": size, "limit": limit, "precision": "float32"}
    results = evaluate(str(model_folder("llama")), ppl=("wikitext2",), **settings)
    scores = results["perplexity"]["wikitext2"]
    windows = windows_of(f"wikitext2 test. {TEXT}", tiny_tokenizer, size, limit)
    expected = straightforward(make_model("llama"), windows)
    assert scores["full_precision"] == pytest.approx(expected, rel=1e-5)
    assert f"{len(windows)} x {size} = {windows.numel()} tokens" in scores["text"]


def test_every_family(variant, make_model, make_bench, token_ids):
    model, windows = make_model(variant), token_ids(5, 24)
    assert measure(make_bench(model), windows) == pytest.approx(
        straightforward(model, windows), rel=1e-5
    )


def test_another_text_or_limit_is_seen(make_model, make_bench, token_ids):
    """Negative control: the tolerance tells a token, a window and a shift by one apart."""
    model, windows = make_model("llama"), token_ids(5, 24)
    measured = measure(make_bench(model), windows)
    other = windows.clone()
    other[4, 20] = 3 + (other[4, 20] - 2) % 250
    for wrong in (other, windows[:4], windows[:, :-1], windows.roll(1, 1)):
        assert abs(straightforward(model, wrong) / measured - 1) > 1e-4


@pytest.mark.parametrize("tokens", [1, 5, 23, 24])
def test_logits_in_parts_are_the_same(make_model, make_bench, token_ids, monkeypatch, tokens):
    model, windows = make_model("llama-tied"), token_ids(3, 24)
    monkeypatch.setattr(evaluation, "tokens_at_once", lambda device, vocabulary: tokens)
    assert measure(make_bench(model), windows) == pytest.approx(
        straightforward(model, windows), rel=1e-5
    )


@pytest.mark.parametrize("tokens", [1, 24, 50, 10_000])
def test_windows_in_batches_are_the_same(make_model, make_bench, token_ids, monkeypatch, tokens):
    model, windows = make_model("opt"), token_ids(5, 24)
    monkeypatch.setattr(subjects, "EVALUATION_TOKENS", tokens)
    assert measure(make_bench(model), windows) == pytest.approx(
        straightforward(model, windows), rel=1e-5
    )


@pytest.mark.parametrize("scheme", ["W4A4", "W3A16g16", "W16A8", "W4A8-qkv16"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_quantised_equals_the_materialised_model(make_model, make_bench, token_ids, family, scheme):
    bench, windows = make_bench(make_model(family)), token_ids(3, 24)
    parsed = Scheme.parse(scheme)
    learned = materialize(bench, unlearned(under(bench, parsed)))
    measured = measure(bench, windows, parsed)
    assert measured == pytest.approx(straightforward(learned, windows), rel=1e-5)
    assert measured != pytest.approx(measure(bench, windows), rel=1e-4)


def test_learned_equals_the_materialised_model(make_model, tiny_tokenizer, data_dir, tmp_path):
    run = quantize(
        make_model("llama"),
        "W4A4",
        tokenizer=tiny_tokenizer,
        output_dir=str(tmp_path / "run"),
        data_dir=str(data_dir),
        ppl=("wikitext2", "ptb"),
        compare=True,
        **{"nsamples": 2, "seqlen": 24, "epochs": 3, "precision": "float32", "report": False},
    )
    text = windows_of(f"wikitext2 test. {TEXT}", tiny_tokenizer, 24)
    scores = run.results["perplexity"]["wikitext2"]
    assert scores["quantized"] == pytest.approx(straightforward(run.load_model(), text), rel=1e-5)
    expected = straightforward(make_model("llama"), text)
    assert scores["full_precision"] == pytest.approx(expected, rel=1e-5)
    plain = materialize(run.workbench, unlearned(run.workbench))
    assert scores["round_to_nearest"] == pytest.approx(straightforward(plain, text), rel=1e-5)
    assert list(run.results["perplexity"]) == ["wikitext2", "ptb"]


def test_bfloat16_agrees_with_float32(make_model, make_bench, token_ids):
    windows = token_ids(5, 24)
    scores = [
        measure(make_bench(make_model("llama"), dtype), windows)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert scores[0] != scores[1] and scores[1] == pytest.approx(scores[0], rel=2e-2)


def test_a_hopeless_model_has_infinite_perplexity(make_model, make_bench, token_ids):
    model = make_model("llama")
    model.lm_head.weight *= 1e6
    assert measure(make_bench(model), token_ids(2, 24)) == math.inf


def test_progress_is_told_each_block(make_model, make_bench, token_ids):
    bench, told = make_bench(make_model("llama")), []
    entry = BlockInputs(bench.model, token_ids(2, 8), 1, bench.device)
    (stream,) = bench.streams(entry, 1)
    predictions.send_through(bench.model, full_precision(bench), stream, entry, told.append)
    assert told == [0, 1]


def test_published_sets_that_cannot_be_had_are_left_out_and_named(
    make_model, tiny_tokenizer, data_dir, caplog, monkeypatch
):
    read = texts.perplexity_windows

    def offline(name, *rest):
        if name.startswith("c4"):
            raise LRQuantError(f"{name}: not here")
        return read(name, *rest)

    monkeypatch.setattr(texts, "perplexity_windows", offline)
    caplog.set_level(logging.WARNING, "lrquant")
    model = from_module(make_model("llama"), tiny_tokenizer)
    config = Config(eval_ppl=True, seqlen=24, data_dir=str(data_dir))
    assert list(texts_read(config, model)) == ["wikitext2", "ptb", "ptb-new"]
    assert [message.split(" is left out")[0] for message in caplog.messages] == [
        *("text c4", "text c4-new")
    ]


def test_sets_asked_for_by_name_must_be_there(make_model, tiny_tokenizer, data_dir, monkeypatch):
    model = from_module(make_model("llama"), tiny_tokenizer)
    settings = {"seqlen": 24, "data_dir": str(data_dir)}
    with pytest.raises(LRQuantError, match="unknown data set 'nonsense'"):
        texts_read(Config(ppl=("wikitext2", "nonsense"), **settings), model)
    with pytest.raises(LRQuantError, match="fewer than one window of seqlen 100000"):
        texts_read(Config(ppl=("wikitext2",), **settings | {"seqlen": 100000}), model)

    def nothing(name, *rest):
        raise LRQuantError(f"{name}: not here")

    monkeypatch.setattr(texts, "perplexity_windows", nothing)
    with pytest.raises(LRQuantError, match="wikitext2: not here"):
        texts_read(Config(eval_ppl=True, **settings), model)
    assert texts_read(Config(**settings), model) == {}


def test_its_standard_error_is_that_of_the_windows(make_model, make_bench, token_ids):
    """By the delta method: the loss's own, times the perplexity; a single window tells of none."""
    model, windows = make_model("llama"), token_ids(5, 24)
    with torch.no_grad():
        logits = model(windows).logits[:, :-1].double()
    losses = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), windows[:, 1:], reduction="none"
    )
    spread = float(losses.mean(1).std()) / 5**0.5
    samples = Samples(windows, "text", "test", "", "a text")
    subject = BlockSubject("full_precision", make_bench(model))
    columns = [("full_precision", subject)]
    scores = score_text([MEASURE], columns, samples, Progress())[0].scores["full_precision"]
    assert scores.stderr == pytest.approx(scores.perplexity * spread, rel=1e-4)
    one = dataclasses.replace(samples, ids=windows[:1])
    scores = score_text([MEASURE], columns, one, Progress())[0].scores["full_precision"]
    assert scores.stderr is None


def test_sets_by_name_come_before_the_published_five():
    def names(**settings):
        return [text.name for text in texts.texts_of(Config(**settings).measuring)]

    assert names(eval_ppl=True) == ["wikitext2", "ptb", "c4", "ptb-new", "c4-new"]
    assert names(eval_ppl=True, ppl=("c4",)) == ["c4"]
    assert names() == []
    assert names(ppl=("c4",), agreement=("ptb", "c4")) == ["c4", "ptb"]
