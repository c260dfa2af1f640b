"""Zero-shot tasks: refused early without the harness, and given the model that was learned."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from lrquant import LRQuantError, quantize
from lrquant.config import Config
from lrquant.evaluation import measures, zero_shot
from lrquant.evaluation.measures import prepare_evaluation, preparer
from lrquant.evaluation.zero_shot import check_tasks, evaluate_tasks
from lrquant.materialize import materialize
from lrquant.model import from_module
from lrquant.scheme import FLOATING_POINT, Scheme
from lrquant.workbench import Workbench

CONTEXT, CONTINUATION = "The square of seven is", " forty-nine."


def need_the_harness():
    if not all(importlib.util.find_spec(name) for name in zero_shot.NEEDED):
        pytest.skip("needs the extra lrquant[eval]")


@pytest.fixture
def bench(make_model, tiny_tokenizer):
    model = from_module(make_model("llama"), tiny_tokenizer)
    return Workbench(model, torch.device("cpu"), torch.float32, "host")


@pytest.fixture
def harness(monkeypatch):
    """The harness with its tasks replaced by one request; a list of how it was called."""
    need_the_harness()
    import lm_eval
    from lm_eval.api.instance import Instance

    calls = []

    def evaluate(model, **settings):
        calls.append(settings)
        request = Instance("loglikelihood", {}, (CONTEXT, CONTINUATION), 0)
        ((log_likelihood, greedy),) = model.loglikelihood([request], disable_tqdm=True)
        return {"results": {"fake": {"log_likelihood": log_likelihood, "greedy": greedy}}}

    monkeypatch.setattr(lm_eval, "simple_evaluate", evaluate)
    return calls


@torch.no_grad()
def log_likelihood(model, tokenizer):
    context, continuation = (
        tokenizer(text, add_special_tokens=False).input_ids for text in (CONTEXT, CONTINUATION)
    )
    ids = torch.tensor([context + continuation])
    scores = model(ids).logits[0, :-1].log_softmax(-1)
    positions = range(len(context) - 1, ids.shape[1] - 1)
    return sum(float(scores[i, ids[0, i + 1]]) for i in positions)


@pytest.mark.parametrize("absent", zero_shot.NEEDED)
def test_without_the_harness_the_error_says_what_to_install(bench, monkeypatch, absent):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == absent else find(n))
    expected = rf"--tasks piqa: .*{absent}.* pip install 'lrquant\[eval\]'"
    with pytest.raises(LRQuantError, match=expected):
        check_tasks("piqa")
    with pytest.raises(LRQuantError, match="--tasks piqa"):
        prepare_evaluation(Config(tasks="piqa"), bench.model)


@pytest.mark.parametrize("scheme", [FLOATING_POINT, Scheme(4, 4)], ids=["full", "W4A4"])
def test_the_harness_scores_the_model_it_is_given(bench, harness, scheme):
    prepare = preparer(bench, scheme)
    results = evaluate_tasks(bench, prepare, Config(tasks="a, b", num_fewshot=2, limit=7))
    expected = log_likelihood(materialize(bench, prepare), bench.model.tokenizer)
    assert results["fake"]["log_likelihood"] == pytest.approx(expected, rel=1e-4)
    assert harness == [{"tasks": ["a", "b"], "num_fewshot": 2, "limit": 7}]
    other = FLOATING_POINT if scheme != FLOATING_POINT else Scheme(4, 4)
    different = log_likelihood(materialize(bench, preparer(bench, other)), bench.model.tokenizer)
    assert different != pytest.approx(expected, rel=1e-4)


def test_no_limit_by_default(bench, harness):
    evaluate_tasks(bench, preparer(bench, FLOATING_POINT), Config(tasks="a"))
    assert harness[0]["limit"] is None


def test_tasks_of_a_run_are_scored_as_learned(
    make_model, tiny_tokenizer, token_ids, harness, tmp_path, monkeypatch
):
    monkeypatch.setattr(measures, "check_tasks", lambda tasks: None)
    run = quantize(
        make_model("llama"),
        "W4A4",
        tokenizer=tiny_tokenizer,
        samples=token_ids(2, 16),
        output_dir=str(tmp_path),
        tasks="fake",
        **{"epochs": 2, "precision": "float32"},
    )
    expected = log_likelihood(run.load_model(), tiny_tokenizer)
    assert run.results["tasks"]["fake"]["log_likelihood"] == pytest.approx(expected, rel=1e-4)
    assert json.loads((tmp_path / "results.json").read_text()) == run.results


def test_unknown_tasks_are_named():
    need_the_harness()
    zero_shot.check_tasks("piqa,arc_easy,arc_challenge,boolq,hellaswag,winogrande")
    with pytest.raises(LRQuantError, match="the harness has no task nonsense, piqqa"):
        zero_shot.check_tasks("piqqa,boolq,nonsense")
