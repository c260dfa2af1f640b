"""results.json: no measure is lost, and none stands beside one of something else."""

from __future__ import annotations

import copy

import pytest
import torch

from lrquant import evaluate, quantize
from lrquant.measures.tables import results_table
from lrquant.runs.results import beside, entries, merge_results, of_base, seen_from

ABOUT = {"scheme": "W4A4", "model": "m", "precision": "float32", "device": "cpu", "threads": 2}
ABOUT |= {"versions": {"lrquant": "0.1.0", "torch": "2.13.0", "python": "3.11.1"}}
ITEMS = {"measured": 40, "of": 632, "unit": "windows of 512 tokens"}
TEXT = {"text": "wikitext2/test, 40 x 512", "sha256": "a", "items": ITEMS}
FEWER = {"text": "wikitext2/test, 8 x 512", "sha256": "b", "items": {**ITEMS, "measured": 8}}


def measured(kind, name, entry, **about):
    return {**ABOUT, **about, kind: {name: entry}}


def rows(results, kind="perplexity"):
    return [entry for _, entry in entries(results, kind)]


def test_values_of_the_same_windows_come_together():
    old = measured("perplexity", "w", {**TEXT, "quantized": 3.0, "full_precision": 1.0})
    merged = merge_results(old, measured("perplexity", "w", {**TEXT, "quantized": 3.0}))
    assert merged["perplexity"] == {"w": {**TEXT, "quantized": 3.0, "full_precision": 1.0}}
    assert "others" not in merged


def test_values_of_other_windows_stand_apart_and_both_are_kept():
    old = measured("perplexity", "w", {**TEXT, "quantized": 3.0, "full_precision": 1.0})
    new = measured("perplexity", "w", {**FEWER, "quantized": 5.0})
    merged = merge_results(old, new)
    assert merged["perplexity"]["w"] == {**FEWER, "quantized": 5.0}
    assert merged["others"] == {"perplexity": {"w": [old["perplexity"]["w"]]}}
    again = merge_results(merged, measured("perplexity", "w", {**TEXT, "round_to_nearest": 9.0}))
    assert rows(again) == [
        {**TEXT, "quantized": 3.0, "full_precision": 1.0, "round_to_nearest": 9.0},
        {**FEWER, "quantized": 5.0},
    ]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"precision": "bfloat16"}, "in bfloat16"),
        ({"threads": 1}, "1 thread"),
        ({"device": "cuda:0"}, "on cuda:0"),
        ({"scheme": "W3A16"}, "W3A16"),
        ({"model": "n"}, "of n"),
        ({"versions": {"lrquant": "0.1.0", "torch": "2.12.0"}}, "torch 2.12.0"),
    ],
)
def test_what_was_measured_in_another_way_says_so(other, said):
    old = measured("perplexity", "w", {**TEXT, "full_precision": 1.0}, **other)
    merged = merge_results(old, measured("perplexity", "w", {**TEXT, "quantized": 3.0}))
    assert "full_precision" not in merged["perplexity"]["w"]
    (apart,) = merged["others"]["perplexity"]["w"]
    assert apart["full_precision"] == 1.0 and apart["measured_with"]
    assert any(said in line for line in results_table(merged).splitlines())
    back = merge_results(merged, {**ABOUT, **other})  # a command that measured nothing
    assert "measured_with" not in rows(back)[1] and "measured_with" in rows(back)[0]


def test_the_version_of_python_is_no_other_way():
    other = {"versions": {**ABOUT["versions"], "python": "3.12.0"}}
    old = measured("perplexity", "w", {**TEXT, "full_precision": 1.0}, **other)
    merged = merge_results(old, measured("perplexity", "w", {**TEXT, "quantized": 3.0}))
    assert rows(merged) == [{**TEXT, "full_precision": 1.0, "quantized": 3.0}]


def test_a_measure_that_the_command_did_not_take_stays():
    agreed = {**TEXT, "quantized": {"kl_mean": 0.1}}
    old = measured("agreement", "w", agreed, max_drop={"acceptable": False})
    merged = merge_results(old, measured("perplexity", "c4", {**TEXT, "quantized": 3.0}))
    assert merged["agreement"] == {"w": agreed} and not merged["max_drop"]["acceptable"]


def test_agreement_with_full_precision_and_with_a_base_are_two():
    old = measured("agreement", "w", {**TEXT, "quantized": {"kl_mean": 0.1}})
    new = {**TEXT, "reference": "base", "quantized": {"kl_mean": 0.7}}
    merged = merge_results(old, of_base(measured("agreement", "w", new), "BASE"))
    assert [row["quantized"]["kl_mean"] for row in rows(merged, "agreement")] == [0.7, 0.1]
    assert merged["agreement"]["w"]["base_model"] == "BASE"


def task(items=1838, shots=0, **variants):
    counts = {"measured": items, "of": 1838, "unit": "items"}
    return {"data": "validation, 1838 items", "items": counts, "num_fewshot": shots, **variants}


def score(value):
    return {"acc,none": value, "acc_stderr,none": 0.1}


def change(value):
    return {"acc,none": {"difference": value, "stderr": 0.1}}


def test_tasks_over_other_items_or_prompts_do_not_mix():
    old = task(quantized=score(0.5), base=score(0.6), differences={"base": change(-0.1)})
    for other in (task(items=4, quantized=score(1.0)), task(shots=5, quantized=score(0.7))):
        merged = merge_results(measured("tasks", "piqa", old), measured("tasks", "piqa", other))
        assert rows(merged, "tasks") == [other, old]
        assert "n = 4 of 1838" in results_table(merged) or "5 examples" in results_table(merged)


def test_differences_over_the_same_items_come_together():
    old = task(quantized=score(0.5), base=score(0.6), differences={"base": change(-0.1)})
    new = task(quantized=score(0.5), full_precision=score(0.7))
    new["differences"] = {"full_precision": change(-0.2)}
    merged = merge_results(measured("tasks", "piqa", old), measured("tasks", "piqa", new))
    assert set(merged["tasks"]["piqa"]["differences"]) == {"base", "full_precision"}
    assert {"quantized", "base", "full_precision"} < merged["tasks"]["piqa"].keys()


def test_means_over_other_tasks_of_one_label_are_two():
    def mean(tasks, value):
        return {"acc": {"tasks": tasks, "quantized": {"mean": value, "stderr": 0.1}}}

    label = "mean of 2 tasks"
    old = measured("task_means", label, mean(["piqa", "boolq"], 0.5))
    merged = merge_results(old, measured("task_means", label, mean(["piqa", "sciq"], 0.6)))
    assert [row["acc"]["tasks"][1] for row in rows(merged, "task_means")] == ["sciq", "boolq"]
    more = mean(["piqa", "sciq"], 0.6)
    more["acc"]["base"] = {"mean": 0.7, "stderr": 0.1}
    merged = merge_results(merged, measured("task_means", label, more))
    assert merged["task_means"][label]["acc"].keys() == {"tasks", "quantized", "base"}


def test_another_base_is_another_row_with_its_name():
    first = of_base(measured("perplexity", "w", {**TEXT, "quantized": 3.0, "base": 2.0}), "a/one")
    second = of_base(measured("perplexity", "w", {**TEXT, "quantized": 3.0, "base": 4.0}), "b/two")
    merged = merge_results(first, second)
    assert [row["base"] for row in rows(merged)] == [4.0, 2.0]
    text = results_table(merged)
    assert "base one" in text and "base two" in text
    assert "base (one)" in results_table(first)


def test_a_base_that_reads_other_tokens_does_not_stand_in_the_row():
    own = measured("perplexity", "w", {**TEXT, "quantized": 3.0})
    base = {"perplexity": {"w": {**TEXT, "sha256": "other", "base": 2.0}}}
    merged = beside(own, base)
    assert merged["perplexity"]["w"] == {**TEXT, "quantized": 3.0}
    assert merged["others"]["perplexity"]["w"] == [base["perplexity"]["w"]]
    assert beside(merged, {"peak_memory_bytes": 3}) == {**merged, "peak_memory_bytes": 3}


def test_pictures_of_one_set_come_together_and_of_another_not():
    few = {"text": "8 pictures", "items": {"measured": 8, "of": 20, "unit": "pictures"}}
    old = {**ABOUT, "classification": {**few, "quantized": {"accuracy": 0.5}}}
    new = {**ABOUT, "classification": {**few, "full_precision": {"accuracy": 0.75}}}
    assert rows(merge_results(old, new), "classification") == [
        {**few, "quantized": {"accuracy": 0.5}, "full_precision": {"accuracy": 0.75}}
    ]
    more = {**ABOUT, "classification": {"text": "20 pictures", "quantized": {"accuracy": 0.6}}}
    merged = merge_results(old, more)
    assert merged["classification"]["text"] == "20 pictures"
    assert merged["others"]["classification"][""] == [old["classification"]]
    asked = measured("vqa", "q", {**few, "quantized": {"exact_match": 0.5}})
    merged = merge_results(merged, asked)
    assert merged["vqa"] == asked["vqa"] and len(rows(merged, "classification")) == 2


def test_merging_changes_neither_and_twice_is_once():
    old = measured("perplexity", "w", {**TEXT, "quantized": 3.0}, precision="bfloat16")
    new = measured("perplexity", "w", {**TEXT, "quantized": 3.1})
    kept = copy.deepcopy((old, new))
    merged = merge_results(old, new)
    assert (old, new) == kept and merge_results(merged, new) == merged


def test_a_later_evaluate_loses_nothing(model_folder, tmp_path):
    (tmp_path / "t").mkdir()
    for split in ("train", "test"):
        (tmp_path / "t" / f"{split}.txt").write_text("some words and 1 2 3 numbers. " * 20)
    common = {"data_dir": str(tmp_path), "report": False, "ppl": ("t",)}
    settings = {"nsamples": 2, "seqlen": 16, "epochs": 0, "calib_dataset": "t", "lwc": True}
    settings |= {"precision": "float32", "output_dir": str(tmp_path / "run")}
    run = quantize(
        model_folder("llama"), "W4A4", compare=True, agreement=("t",), limit=3, **settings, **common
    )
    full = run.results["perplexity"]["t"]
    assert full["items"] == {"measured": 3, "of": 37, "unit": "windows of 16 tokens"}
    assert run.results["threads"] == torch.get_num_threads()

    again = evaluate(str(tmp_path / "run"), limit=3, **common)
    assert again["perplexity"]["t"] == full and again["agreement"] == run.results["agreement"]
    longer = evaluate(str(tmp_path / "run"), limit=5, **common)
    assert longer["perplexity"]["t"].keys() == {"text", "sha256", "items", "quantized"}
    assert longer["others"]["perplexity"]["t"] == [full]
    rounded = evaluate(str(tmp_path / "run"), limit=3, precision="bfloat16", **common)
    assert rounded["perplexity"]["t"]["quantized"] != full["quantized"]
    apart = rounded["others"]["perplexity"]["t"]
    assert {"measured_with": {"precision": "float32"}, **full} in apart and len(apart) == 2
    assert rounded["agreement"]["t"]["measured_with"] == {"precision": "float32"}
    assert rounded["learned_with"]["precision"] == "float32"
    own = seen_from(rounded, "float32")
    assert rows(own)[0]["measured_with"] == {"precision": "bfloat16"}
    assert not any("measured_with" in row for row in rows(own)[1:])
    lines = results_table(own).splitlines()
    assert any("t, n = 3 of 37 windows of 16 tokens, in bfloat16" in line for line in lines)
    lines = results_table(rounded).splitlines()
    assert any("t, n = 3 of 37 windows of 16 tokens, in float32" in line for line in lines)
    assert any("t, n = 5 of 37 windows of 16 tokens, in float32" in line for line in lines)
