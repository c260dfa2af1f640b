"""Agreement with the full-precision model, against torch on transformers' own logits."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lrquant import quantize
from lrquant.blocks.materialize import materialize
from lrquant.blocks.plan import Plan
from lrquant.blocks.variants import unlearned
from lrquant.config.scheme import FLOATING_POINT, Scheme
from lrquant.config.schemes import Schemes
from lrquant.data.samples import Samples
from lrquant.measures.agreement import MEASURE
from lrquant.measures.evaluation import evaluation
from lrquant.measures.evaluation.evaluation import score_text
from lrquant.measures.subjects.subject import BlockSubject
from lrquant.measures.tables import results_table
from lrquant.runs.progress import Progress


def under(bench, scheme):
    return dataclasses.replace(bench, plan=Plan(Schemes(scheme)))


def measured(bench, windows, scheme):
    """Results of a model rounded to nearest, held against its full precision."""
    samples = Samples(windows, "text", "test", "", "a text")
    subject = BlockSubject("full_precision", under(bench, scheme))
    columns = [("full_precision", subject), ("round_to_nearest", subject)]
    (scored,) = score_text([MEASURE], columns, samples, Progress(), held=True)
    return MEASURE.entries(scored, MEASURE.settings())


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("scheme", ["W4A4", "W3A16g16"])
@pytest.mark.parametrize("tokens", [7, 512])
def test_divergence_is_torch_s(
    make_model, make_bench, token_ids, family, scheme, tokens, monkeypatch
):
    monkeypatch.setattr(evaluation, "tokens_at_once", lambda device, vocabulary: tokens)
    module, windows = make_model(family), token_ids(3, 24)
    module.lm_head.weight *= 4  # distributions sharp enough to tell the direction
    bench = make_bench(module)
    parsed = Scheme.parse(scheme)
    scores = measured(bench, windows, parsed)["agreement"]["text"]["round_to_nearest"]
    quantised = materialize(bench, unlearned(under(bench, parsed)))
    with torch.no_grad():
        full, other = (model(windows).logits[:, :-1].double() for model in (module, quantised))
    divergence = torch.nn.functional.kl_div(
        other.log_softmax(-1), full.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    assert scores["kl_mean"] == pytest.approx(float(divergence.mean()), rel=1e-3)
    ordered = divergence.flatten().sort().values
    rank = -(-99 * len(ordered) // 100)
    assert scores["kl_p99"] == pytest.approx(float(ordered[rank - 1]), rel=1e-3)
    same = (full.argmax(-1) == other.argmax(-1)).double().mean()
    assert scores["same_top"] == pytest.approx(float(same), abs=0.02)
    reversed_ = torch.nn.functional.kl_div(
        full.log_softmax(-1), other.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    assert scores["kl_mean"] != pytest.approx(float(reversed_.mean()), rel=1e-3), "direction"


def test_the_ratio_and_what_is_said_along_the_window(make_model, make_bench, token_ids):
    module, windows = make_model("llama"), token_ids(3, 24)
    module.lm_head.weight *= 4
    bench, parsed = make_bench(module), Scheme.parse("W3A16g16")
    results = measured(bench, windows, parsed)
    scores, perplexities = (
        results["agreement"]["text"]["round_to_nearest"],
        results["perplexity"]["text"],
    )
    ratio = perplexities["round_to_nearest"] / perplexities["full_precision"]
    assert scores["perplexity_ratio"] == pytest.approx(ratio, rel=1e-5)
    spans = [(entry["first"], entry["last"]) for entry in scores["positions"]]
    assert spans == [(1, 1), (2, 3), (4, 7), (8, 15), (16, 23)]
    quantised = materialize(bench, unlearned(under(bench, parsed)))
    with torch.no_grad():
        full, other = (model(windows).logits[:, :-1].double() for model in (module, quantised))
    full, other = full.log_softmax(-1), other.log_softmax(-1)
    divergence = (full.exp() * (full - other)).sum(-1)
    for entry in scores["positions"]:
        part = slice(entry["first"] - 1, entry["last"])
        assert entry["kl_mean"] == pytest.approx(float(divergence[:, part].mean()), rel=1e-3)
        targets = windows[:, 1:, None][:, part]
        gap = (full[:, part] - other[:, part]).gather(-1, targets).mean()
        assert entry["perplexity_ratio"] == pytest.approx(float(gap.exp()), rel=1e-3)
    first, last = scores["positions"][0]["kl_mean"], scores["positions"][-1]["kl_mean"]
    assert first != pytest.approx(last, rel=1e-2), "or a mistaken span would not be seen"


def test_a_model_agrees_with_itself(make_model, make_bench, token_ids):
    scores = measured(make_bench(make_model("llama")), token_ids(2, 16), FLOATING_POINT)
    found = scores["agreement"]["text"]["round_to_nearest"]
    assert abs(found["kl_mean"]) < 1e-6 and found["same_top"] == 1
    assert found["perplexity_ratio"] == pytest.approx(1, rel=1e-6)


def test_a_run_measures_it_where_asked(make_model, tiny_tokenizer, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.txt").write_text("some words and 1 2 3 numbers. " * 20)
    settings = {"nsamples": 2, "seqlen": 16, "epochs": 1, "limit": 3, "data_dir": str(tmp_path)}
    (tmp_path / "one" / "train.txt").write_text("some words, and some more of them. " * 20)
    settings |= {"calib_dataset": "one", "output_dir": str(tmp_path / "run"), "ppl": ("two",)}
    settings |= {"report": False}
    run = quantize(
        make_model("llama"), "W4A4", tokenizer=tiny_tokenizer, agreement=("one",), **settings
    )
    assert list(run.results["perplexity"]) == ["two", "one"]
    assert list(run.results["agreement"]) == ["one"]
    assert list(run.results["agreement"]["one"]) == ["text", "sha256", "items", "quantized"]
    assert "full_precision" in run.results["perplexity"]["one"]
    assert "full_precision" not in run.results["perplexity"]["two"]
    table = results_table(run.results)
    assert "agreement with full precision" in table and "one, n = 3 of 37, LRQuant" in table
