"""The harness's requests dealt out over processes: each has the numbers that one process gives."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="needs the extra lrquant[eval]")

from lm_eval.api.instance import Instance

from lrquant.measures.harness import sharing
from lrquant.measures.harness.scores import _wrapped
from lrquant.measures.measure import WholeModel
from lrquant.model.loading import from_module

TEAMS = Path(__file__).parents[1] / "learn" / "test_team.py"


@pytest.fixture(scope="module")
def together():
    """together(work, size): what `work(team)` gives for each member, members being threads."""
    spec = importlib.util.spec_from_file_location("teams", TEAMS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.together


@pytest.fixture
def make_own(make_model, tiny_tokenizer):
    """make_own(size) -> the harness's model of a model of its own."""

    def make(size):
        module = make_model("llama").eval()
        whole = WholeModel(module, from_module(module, tiny_tokenizer), "quantized")
        return _wrapped(whole, size, "auto")

    return make


def asked(kind, arguments):
    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


def choices():
    """Pairs of several lengths, of which some differ in their last token alone."""
    pairs = [(f"{n} and {'more ' * (n % 5)}is", f" {n * 7 % 23}") for n in range(17)]
    return pairs + [("is it", f" ye{last}") for last in "sat"] + [("", "alone"), ("is", " it so")]


def prompts():
    kinds = [{"until": ["\n"], "max_gen_toks": 4}, {"max_gen_toks": 3, "until": ["."]}]
    return [(f"count {'on ' * (n % 4)}to {n}", kinds[n % 3 == 0]) for n in range(11)]


REQUESTS = {
    "loglikelihood": choices,
    "generate_until": prompts,
    "loglikelihood_rolling": lambda: [(f"{'one more ' * (n % 6)}{n}",) for n in range(7)],
}


def answers(together, make_own, size, kind, requests):
    """What the first of so many members is told."""

    def work(team):
        own = make_own("3")
        if team.rank:
            return sharing.serve(own, team)
        answered = getattr(sharing.SharedModel(own, team), kind)(requests)
        sharing.finish(team)
        return answered

    return together(work, size)[0]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("kind", REQUESTS)
def test_members_answer_what_one_does(together, make_own, kind, size):
    requests = asked(kind, REQUESTS[kind]())
    expected = getattr(make_own("3"), kind)(requests)
    shared = answers(together, make_own, size, kind, requests)
    if kind == "loglikelihood_rolling":
        assert shared == pytest.approx(expected, rel=1e-5)
    else:
        assert shared == expected and len(set(map(str, expected))) > 5


def test_more_members_than_batches(together, make_own):
    requests = asked("loglikelihood", choices()[:2])
    expected = make_own("3").loglikelihood(requests)
    assert answers(together, make_own, 3, "loglikelihood", requests) == expected


def test_the_size_of_a_batch_is_tried_once_for_all(together, make_own, monkeypatch):
    monkeypatch.setattr("lrquant.measures.harness.scores.CPU_BATCH", "auto")
    tried = []
    monkeypatch.setattr(
        "lm_eval.models.huggingface.HFLM._detect_batch_size",
        lambda own, requests=None, pos=0: tried.append(len(requests[0][1])) or 3,
    )
    requests = asked("loglikelihood", choices())

    def work(team):
        own = make_own("auto")
        if team.rank:
            return sharing.serve(own, team)
        given = sharing.SharedModel(own, team).loglikelihood(requests)
        sharing.finish(team)
        assert own.batch_size == "auto", "to be tried again for other requests"
        return given

    assert together(work)[0] == make_own("3").loglikelihood(requests)
    lengths = [len(f"{pair[0]}{pair[1]}") for pair in choices()]
    assert len(tried) == 1 and tried[0] >= max(lengths) - 4, "the longest come first"


def test_batches_go_to_who_has_the_least_to_do():
    batches, lengths = [[0, 1], [2, 3], [4], [5]], [9, 8, 5, 4, 3, 2]
    assert sharing.dealt(batches, lengths, 2) == [[0, 1], [2, 3, 4, 5]]
    assert sharing.dealt(batches, lengths, 1) == [[0, 1, 2, 3, 4, 5]]
    assert sharing.dealt([], [], 2) == [[], []]
