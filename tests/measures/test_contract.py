"""The contract of a measure: every one of this package, and of others that are installed."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from lrquant import LRQuantError, evaluate, quantize
from lrquant.config.config import Config
from lrquant.measures.choice import measures, text_measures
from lrquant.measures.evaluation.resolution import asks_for_measures, no_measures
from lrquant.measures.rows import RunResults, labels_of
from lrquant.measures.tables import results_table
from lrquant.preflight.checks import preflight
from lrquant.runs.results import entries, kinds, merge_results

MEASURES = pytest.mark.parametrize("measure", measures(), ids=lambda measure: measure.name)
TEXTS = pytest.mark.parametrize("measure", text_measures(), ids=lambda measure: measure.name)
ITEMS = {"measured": 4, "of": 40, "unit": "items"}
SETTINGS = {"seqlen": 24, "limit": 4, "precision": "float32"}


def scores_of(measure, value):
    """One variant's scores as results.json might have them."""
    if measure.name == "perplexity":
        return value
    if measure.name == "tasks":
        return {"acc,none": value, "acc_stderr,none": 0.1}
    return {key: value for key in measure.metrics}


def results_of(measure, value, **about):
    """Results that have one entry of a measure."""
    told = {"quantized": scores_of(measure, value), "full_precision": scores_of(measure, 0.75)}
    entry = {"text": "a set", "items": ITEMS, **about, **told}
    inside = entry if measure.unnamed else {"a set": entry}
    return {"scheme": "W4A4", "model": "m", measure.name: inside}


def asking(measure, texts):
    """The settings that ask a measure of texts for these."""
    lists = [
        entry.name
        for entry in dataclasses.fields(measure.settings)
        if entry.name in measure.asked_by and entry.default == ()
    ]
    return {lists[-1]: texts}


@MEASURES
def test_every_setting_has_a_default_and_a_help(measure):
    for entry in dataclasses.fields(measure.settings):
        assert entry.default is not dataclasses.MISSING and len(entry.metadata["help"]) > 8
        assert getattr(Config(), entry.name) == entry.default
    assert set(measure.asked_by) <= {entry.name for entry in dataclasses.fields(measure.settings)}


@MEASURES
def test_it_is_taken_where_it_is_asked_for(measure):
    own = Config().group(measure.settings)
    assert not measure.asked(own) and measure.reads(own) == []
    for name in measure.asked_by:
        default = getattr(Config(), name)
        value = True if default is False else ("a",) if default == () else "a"
        config = Config(**{name: value})
        own = config.group(measure.settings)
        assert measure.asked(own) and asks_for_measures({name: value})
        assert name in no_measures() and not measure.asked(
            dataclasses.replace(config, **no_measures()).group(measure.settings)
        )
        assert measure.reads(own) == ([] if value is True else ["a"])


@MEASURES
def test_its_entries_are_shown(measure):
    results = results_of(measure, 0.5)
    assert kinds(results) == [measure.name] and measure.name in measure.kinds
    table = results_table(results)
    assert "0.5" in table and "0.75" in table and "n = 4 of 40" in table
    (shown, *_) = measure.report_tables([RunResults(results, labels_of(results))])
    cells = [cell for row in shown.rows for cell in row]
    assert any(cell.startswith("0.5") for cell in cells)
    assert measure.tables({"scheme": "W4A4"}, labels_of({})) in ([], [""])


@MEASURES
def test_a_later_measure_of_other_items_keeps_the_earlier(measure):
    old = results_of(measure, 0.5)
    more = {"text": "all of it", "items": {**ITEMS, "measured": 40}}
    new = results_of(measure, 0.25, **more)
    merged = merge_results(old, new)
    both = [entry["quantized"] for _, entry in entries(merged, measure.name)]
    assert both == [scores_of(measure, 0.25), scores_of(measure, 0.5)]
    assert merge_results(merged, new) == merged
    table = results_table(merged)
    assert "0.25" in table and "0.5" in table
    same = merge_results(old, results_of(measure, 0.5))
    assert len(list(entries(same, measure.name))) == 1


@pytest.fixture(scope="module")
def texts(make_set):
    return make_set(lambda split, number: f"{number * number} squared", 60)


@TEXTS
def test_a_run_a_checkpoint_and_a_model_are_subjects(
    measure, texts, make_model, tiny_tokenizer, tmp_path
):
    make_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    common = {**SETTINGS, "data_dir": str(texts), **asking(measure, ("wikitext2",))}
    places = {"output_dir": str(tmp_path / "run"), "save_dir": str(tmp_path / "saved")}
    run = quantize(
        tmp_path / "model",
        "W3A16g16",
        **{"nsamples": 2, "epochs": 1, "report": False, "format": "dequantized"},
        **{"save_dtype": "float32", "compare": True, **places, **common},
    )
    written = json.loads((tmp_path / "run" / "results.json").read_text())
    assert written == json.loads(json.dumps(run.results))
    own = run.results[measure.name]["wikitext2"]
    assert {"text", "sha256", "items", "round_to_nearest", "quantized"} <= own.keys()
    saved = evaluate(str(tmp_path / "saved"), **common)[measure.name]["wikitext2"]
    assert close(saved["quantized"], own["quantized"])
    base = {"compare": str(tmp_path / "model")}
    model = evaluate(str(tmp_path / "model"), **base, **common)
    assert "full_precision" in model[measure.name]["wikitext2"]
    if not measure.against_full_precision:
        entry = model[measure.name]["wikitext2"]
        assert entry["base"] == entry["full_precision"] == own["full_precision"]
    again = evaluate(str(tmp_path / "run"), **common | {"limit": 3})
    assert len(list(entries(again, measure.name))) == 2, "nothing is lost"
    assert measure.name in again["others"] and "n = 3 of" in results_table(again)


def close(one, other):
    """Whether two variants' scores are those of one model in two computations."""
    values = [each if isinstance(each, dict) else {"": each} for each in (one, other)]
    pairs = [(values[0][key], values[1][key]) for key in values[0] if key != "positions"]
    return all(
        torch.isclose(torch.tensor(a), torch.tensor(b), rtol=0.05, atol=0.05) for a, b in pairs
    )


@MEASURES
def test_a_set_that_is_not_there_is_refused_before_learning(measure, model_folder, tmp_path):
    name = measure.asked_by[-1]
    default = getattr(Config(), name)
    asked = {name: ("nowhere",) if default == () else "nowhere"}
    (tmp_path / "text.txt").write_text("a text to calibrate on " * 20)
    settings = {"model": str(model_folder("llama")), "wbits": 4, "data_dir": str(tmp_path)}
    settings |= {"nsamples": 1, "seqlen": 8, "calib_dataset": str(tmp_path / "text.txt")}
    settings |= {"output_dir": str(tmp_path / "run"), **asked}
    failed = [finding.text for finding in preflight(settings).failed]
    with pytest.raises(LRQuantError) as raised:
        quantize(**settings)
    assert failed == [str(raised.value)] and not (tmp_path / "run").exists()
