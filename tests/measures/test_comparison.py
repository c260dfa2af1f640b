"""Differences of scores, their standard errors, means and the verdict, against a plain formula."""

from __future__ import annotations

import math
from statistics import fmean, stdev

import pytest

from lrquant import LRQuantError
from lrquant.config.config import Config
from lrquant.measures.choice import check_measures
from lrquant.measures.harness.comparison import PUBLISHED_TASKS, compared
from lrquant.measures.harness.scores import TaskScores
from lrquant.measures.harness.task_list import Tasks
from lrquant.measures.subjects.subject import require_base
from lrquant.measures.tables import results_table

GOOD = [1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0]
POOR = [1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0]


def tasks(*names, members=None, weighted=()):
    parents = {part: top for top, parts in (members or {}).items() for part in parts}
    return Tasks(names, (), {}, members or {}, parents, frozenset(weighted))


def error(values):
    return stdev(values) / math.sqrt(len(values))


def scores(items, **more):
    """TaskScores as the harness would give them, of acc by item."""
    results = {
        name: {"acc,none": fmean(v), "acc_stderr,none": error(v), "alias": name}
        for name, v in items.items()
    }
    found = {name: {"acc,none": v} for name, v in items.items()}
    return TaskScores({"results": results | more}, found)


def test_paired_errors_are_of_the_differences_item_by_item():
    found = compared(
        tasks("piqa"), {"quantized": scores({"piqa": POOR}), "base": scores({"piqa": GOOD})}
    )
    change = found["tasks"]["piqa"]["differences"]["base"]["acc,none"]
    pairs = [p - g for p, g in zip(POOR, GOOD, strict=True)]
    assert change["difference"] == pytest.approx(fmean(pairs))
    assert change["stderr"] == pytest.approx(error(pairs)) and change["items"] == len(pairs)
    shuffled = scores({"piqa": [1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0]})
    other = compared(tasks("piqa"), {"quantized": scores({"piqa": POOR}), "base": shuffled})
    changed = other["tasks"]["piqa"]["differences"]["base"]["acc,none"]
    assert changed["difference"] == change["difference"] and changed["stderr"] != change["stderr"]
    assert "task_means" not in found and "max_drop" not in found


def test_equal_models_differ_by_nothing():
    same = compared(tasks("a"), {"quantized": scores({"a": GOOD}), "base": scores({"a": GOOD})})
    change = same["tasks"]["a"]["differences"]["base"]["acc,none"]
    assert (change["difference"], change["stderr"]) == (0, 0)


def test_what_is_no_mean_of_its_items_is_not_paired():
    left, right = scores({"a": GOOD}), scores({"a": POOR})
    for side, value in ((left, 8.0), (right, 9.0)):
        side.results["a"]["word_perplexity,none"] = value
        side.results["a"]["word_perplexity_stderr,none"] = "N/A"
        side.items["a"]["word_perplexity,none"] = [(-1.0, 3)] * 8
        side.results["a"]["f1,none"], side.results["a"]["f1_stderr,none"] = value / 10, 0.3
    change = compared(tasks("a"), {"quantized": left, "base": right})
    changes = change["tasks"]["a"]["differences"]["base"]
    assert changes["word_perplexity,none"] == {"difference": -1.0, "stderr": None, "paired": False}
    assert changes["f1,none"]["stderr"] == pytest.approx(math.hypot(0.3, 0.3))
    assert not changes["f1,none"]["paired"] and changes["acc,none"]["paired"]


@pytest.mark.parametrize("weighted", [True, False])
def test_a_group_weighs_its_tasks_as_its_accuracy_does(weighted):
    parts = {"x": GOOD, "y": POOR[:4]}
    top = {"mmlu": {"acc,none": 0.6, "acc_stderr,none": 0.2}}
    sides = [scores(parts, **top), scores({"x": POOR, "y": GOOD[:4]}, **top)]
    group = tasks("mmlu", members={"mmlu": ("x", "y")}, weighted=["mmlu"] if weighted else [])
    change = compared(group, {"quantized": sides[0], "base": sides[1]})
    spread = change["tasks"]["mmlu"]["differences"]["base"]["acc,none"]["stderr"]
    errors = [
        error(
            [
                a - b
                for a, b in zip(
                    sides[0].items[n]["acc,none"], sides[1].items[n]["acc,none"], strict=True
                )
            ]
        )
        for n in parts
    ]
    shares = (8 / 12, 4 / 12) if weighted else (0.5, 0.5)
    assert spread == pytest.approx(math.hypot(shares[0] * errors[0], shares[1] * errors[1]))
    assert change["tasks"]["x"]["part_of"] == "mmlu"


def test_the_mean_of_the_six_published_tasks():
    names = (*PUBLISHED_TASKS, "sciq")
    left = scores(dict.fromkeys(names, POOR))
    right = scores(dict.fromkeys(names, GOOD))
    for side, value in ((left, 0.4), (right, 0.7)):
        side.results["hellaswag"] |= {"acc_norm,none": value, "acc_norm_stderr,none": 0.1}
    found = compared(tasks(*names), {"quantized": left, "full_precision": right})
    means = found["task_means"]
    assert set(means) == {"mean of 7 tasks", "mean of the six published tasks"}
    six = means["mean of the six published tasks"]
    assert six["acc"]["quantized"]["mean"] == fmean(POOR)
    assert six["acc"]["quantized"]["stderr"] == pytest.approx(error(POOR) / math.sqrt(6))
    assert six["acc_norm"]["quantized"]["mean"] == pytest.approx((5 * fmean(POOR) + 0.4) / 6)
    change = six["acc_norm"]["differences"]["full_precision"]
    assert change["difference"] == pytest.approx((5 * (fmean(POOR) - fmean(GOOD)) - 0.3) / 6)
    only_six = compared(tasks(*PUBLISHED_TASKS), {"quantized": left})
    assert set(only_six["task_means"]) == {"mean of the six published tasks"}


def test_the_verdict_is_on_the_mean_against_base_or_full_precision():
    poor, good = scores({"a": POOR, "b": GOOD}), scores({"a": GOOD, "b": GOOD})
    drop = (fmean(GOOD) - fmean(POOR)) / 2
    for allowed, said in ((drop + 1e-6, True), (drop - 1e-6, False), (0.0, False)):
        for against in ("base", "full_precision"):
            found = compared(tasks("a", "b"), {"quantized": poor, against: good}, allowed)
            verdict = found["max_drop"]
            assert verdict["drop"] == pytest.approx(drop) and verdict["against"] == against
            assert verdict["acceptable"] is said
            text = results_table({**found, "scheme": "W4A4"})
            assert ("MORE than" in text) is not said and f"{drop:.4f}" in text
    gained = compared(tasks("a", "b"), {"quantized": good, "base": poor}, 0.0)["max_drop"]
    assert gained["drop"] == pytest.approx(-drop) and gained["acceptable"]


def checked(**settings):
    config = Config(**settings)
    check_measures(config.measuring, bool(config.compare))


def test_a_limit_needs_something_to_hold_against_it():
    for settings, needed in (({"tasks": "piqa"}, "--compare"), ({"compare": True}, "--tasks")):
        with pytest.raises(LRQuantError, match=rf"--max_drop 0.1: .* give {needed} too"):
            checked(max_drop=0.1, **settings)
    checked(max_drop=0.1, tasks="piqa", compare=True)
    for wrong in (-0.1, 1.5, math.nan):
        with pytest.raises(LRQuantError, match=r"max_drop .*: use a share of accuracy from 0 to 1"):
            Config(max_drop=wrong)


def test_a_base_that_is_not_there_is_refused_early(tmp_path):
    with pytest.raises(LRQuantError, match="no such"):
        require_base(Config(compare=str(tmp_path / "no such")))
