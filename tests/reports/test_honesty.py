"""The honesty of a report: other models, other windows, parts of sets, unpacked weights."""

from __future__ import annotations

import copy
import json
import math
import resource
import types

import pytest
import torch

from lrquant.blocks.plan import Plan
from lrquant.blocks.workbench import peak_memory
from lrquant.config.config import Config
from lrquant.formats.card import model_card
from lrquant.formats.choice import choose_format
from lrquant.measures.tables import results_table
from lrquant.reports.comparison_charts import comparison_pictures
from lrquant.reports.contents import run_contents
from lrquant.reports.page import comparison_page
from lrquant.reports.result_sections import result_tables
from lrquant.reports.sections import facts, worst_sentence
from lrquant.reports.writing import write_report
from lrquant.runs.folder import RunFolder


@pytest.fixture(scope="module")
def contents(full_run):
    return run_contents(full_run.folder)


def changed(contents, weights=None, **scores):
    """A run of another model, or with other scores on wikitext2."""
    other = copy.deepcopy(contents)
    other["run"]["weights"] = weights or other["run"]["weights"]
    other["results"]["perplexity"]["wikitext2"] |= scores
    return other


def perplexity_caption(*runs):
    pictures = comparison_pictures(runs, [f"run {index}" for index in range(len(runs))])
    return next(p for p in pictures if p.title == "Perplexity on wikitext2").caption


def test_one_line_of_full_precision_only_for_one_model_on_the_same_windows(contents):
    same = perplexity_caption(contents, changed(contents, quantized=3.0))
    assert "Dashed: full precision, of the same model on the same windows" in same
    of_each = "the full precision of each run"
    other_model = perplexity_caption(contents, changed(contents, weights="0" * 64))
    assert of_each in other_model and "of different models" in other_model
    other_windows = perplexity_caption(contents, changed(contents, sha256="0" * 64))
    assert of_each in other_windows and "Not all on the same windows" in other_windows
    rounded = changed(contents, full_precision=9.0, measured_with={"precision": "bfloat16"})
    assert "Not all measured in the same way" in perplexity_caption(contents, rounded)
    alone = changed(contents)
    del alone["results"]["perplexity"]["wikitext2"]["full_precision"]
    assert "precision" not in perplexity_caption(alone, alone)


def test_tables_of_different_models_say_which(contents):
    other = changed(contents, weights="0" * 64)
    other["run"] |= {"model": "another", "unpacked_from": "Q4_1"}
    table = next(t for t in result_tables([contents, other], ["a", "b"]) if "wikitext2" in t.title)
    assert table.head[-1] == "model" and "full precision is each run's own" in table.note
    assert [row[-1] for row in table.rows] == [
        contents["run"]["model"],
        "another, unpacked from Q4_1",
    ]
    page = comparison_page([contents, other], ["a", "b"])
    assert "full precision is each run&#39;s own" in page
    alike = result_tables([contents, contents], ["a", "b"])
    assert next(t for t in alike if "wikitext2" in t.title).head[-1] == "windows"


def test_full_precision_that_was_unpacked_says_so(copied):
    folder = RunFolder.open(copied)
    results = folder.add_results(
        json.loads((copied / "results.json").read_text()) | {"unpacked_from": "Q4_1 and Q8_0"}
    )
    write_report(folder)
    for name in ("report.md", "report.html"):
        text = (copied / name).read_text().replace("\\", "")
        assert "full precision (unpacked from Q4_1 and Q8_0)" in text
        assert "3 blocks, unpacked from Q4_1 and Q8_0)" in text
    assert "full precision (unpacked from Q4_1 and Q8_0)" in results_table(results)


def test_the_largest_errors_are_those_of_the_run(contents):
    made = [block["figures"]["error_made"]["learned"] for block in contents["blocks"]]
    worst, blocks = contents["worst_blocks"], contents["blocks"]
    said = worst_sentence(worst, blocks)
    assert said.startswith(f"Most error for its output's energy: block {made.index(max(made))} (")
    assert "the median of 3 blocks is" in said
    none = [entry | {"error_made": 0.0} for entry in worst]
    assert worst_sentence(none, blocks) == "" == worst_sentence([], blocks)
    one = worst_sentence(worst[:1], blocks[:1])
    assert one.startswith("Error made, of the output's energy: block ")


def test_what_is_no_number_is_said(copied):
    folder = RunFolder.open(copied)
    results = json.loads((copied / "results.json").read_text())
    results["perplexity"]["wikitext2"] |= {"quantized": math.inf, "round_to_nearest": math.nan}
    folder.add_results(results)
    write_report(folder)
    scores = json.loads((copied / "report.json").read_text())["results"]["perplexity"]["wikitext2"]
    assert (scores["quantized"], scores["round_to_nearest"]) == ("inf", "nan")
    assert "<b>inf</b>" in (copied / "report.html").read_text()
    row = next(li for li in (copied / "report.md").read_text().splitlines() if "| wikitext2" in li)
    assert [cell.strip() for cell in row.split("|")[3:5]] == ["nan", "inf"]
    runs = [run_contents(folder)] * 2
    assert not any("Perplexity" in p.title for p in comparison_pictures(runs, ["a", "b"]))


def test_a_part_of_a_set_is_not_shown_as_the_set(contents, copied):
    scores = contents["results"]["perplexity"]["wikitext2"]
    assert scores["items"]["measured"] == 3 < scores["items"]["of"]
    part = f"wikitext2, n = 3 of {scores['items']['of']}"
    for name in ("report.md", "report.html"):
        text = (copied / name).read_text()
        assert f"{part}" in text and f"{part}, adapted to this text" in text
    items = {"measured": 4, "of": 1838, "unit": "items"}
    piqa = {"quantized": {"acc,none": 1.0, "acc_stderr,none": 0.0}, "items": items}
    mean = {"quantized": {"mean": 0.75, "stderr": 0.1}, "tasks": ["piqa", "boolq"]}
    mean["metrics"] = ["acc_norm,none", "acc,none"]
    means = {"mean of 2 tasks": {"acc_norm": mean, "items": {**items, "measured": 8, "of": 5108}}}
    results = {"scheme": "W4A4", "tasks": {"piqa": piqa}, "task_means": means}
    text = results_table(results)
    assert "piqa acc, n = 4 of 1838" in text and "1.0000 ± ?" in text
    assert "mean of 2 tasks, acc_norm (acc where a task has none), n = 8 of 5108" in text


def test_a_set_of_pictures_says_how_many():
    items = {"measured": 1, "of": 200, "unit": "questions"}
    scores = {"exact_match": 1.0, "vqa_accuracy": 1.0}
    results = {"scheme": "W4A4", "vqa": {"q.jsonl": {"items": items, "quantized": scores}}}
    text = results_table(results)
    assert "q.jsonl, exact match, n = 1 of 200" in text and "1.0000 ± ?" in text


def test_where_and_with_how_many_threads(contents):
    run = contents["run"]
    told = dict(facts(run))["Precision"]
    assert f"cpu ({run['cpu']}, {run['threads']} thread" in told
    older = dict(facts({**run, "threads": None}))["Precision"]
    assert older == "float32 matrix products on cpu"


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_peak_memory_is_in_bytes_everywhere(platform, unit, monkeypatch):
    monkeypatch.setattr("lrquant.blocks.workbench.sys", types.SimpleNamespace(platform=platform))
    usage = types.SimpleNamespace(ru_maxrss=7)
    monkeypatch.setattr(resource, "getrusage", lambda who: usage)
    assert peak_memory(torch.device("cpu")) == 7 * unit


def test_a_model_card_says_what_full_precision_was():
    config = Config(model="m", scheme="W4A16").resolved()
    items = {"measured": 4, "of": 632, "unit": "windows of 512 tokens"}
    scores = {"text": "wikitext2/test", "items": items, "full_precision": 2.0}
    results = {"scheme": "W4A16", "perplexity": {"wikitext2": scores}, "unpacked_from": "Q4_1"}
    facts_of_it = {
        **{"auto_class": "AutoModelForCausalLM", "base_model": "m", "scheme": "W4A16", "tower": ""},
        **{"method": "x", "precision": "float32", "calibration": {"text": "t", "sha256": "s"}},
    }
    form = choose_format(Plan.of(config.quantizing), None, None)
    card = model_card(config.schemes, 2, form, {**facts_of_it, "results": results})
    assert "- Full precision: the base model as unpacked from Q4_1" in card
    assert "full precision (unpacked from Q4_1)" in card and "wikitext2, n = 4 of 632" in card
    del results["unpacked_from"]
    plain = model_card(config.schemes, 2, form, {**facts_of_it, "results": results})
    assert "unpacked" not in plain
