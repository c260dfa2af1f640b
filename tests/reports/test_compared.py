"""Comparisons of runs, checkpoints, models and results: what is drawn, what is flagged."""

from __future__ import annotations

import copy
import json

import pytest

from lrquant import evaluate, quantize
from lrquant.errors import LRQuantError
from lrquant.reports.compared import compared_contents, with_known_weights
from lrquant.reports.contents import run_contents
from lrquant.reports.differences import differences, settings_that_differ
from lrquant.reports.tradeoffs import Point, front, tradeoff_pictures
from lrquant.reports.writing import write_comparison

NAMES = ["a", "b"]


@pytest.fixture(scope="module")
def contents(full_run):
    return run_contents(full_run.folder)


@pytest.fixture
def pair(contents):
    first, second = copy.deepcopy(contents), copy.deepcopy(contents)
    second["run"]["seconds"] *= 3
    second["fits"]["formats"]["lrquant"]["bytes"] *= 2
    return [first, second]


def test_points_that_nothing_beats_are_joined():
    costs = {"cheap": (1, 9), "worse": (2, 9.5), "good": (3, 8), "dear": (4, 8)}
    points = [Point(name, "#000", *values) for name, values in costs.items()]
    assert [point.name for point in front(points)] == ["cheap", "good"]
    assert front([]) == []


def test_quality_is_drawn_against_size_and_time(pair):
    size, time = tradeoff_pictures(pair, NAMES)
    assert size.title == "Quality against size, wikitext2"
    assert time.title == "Quality against time, wikitext2"
    assert "different models" not in size.caption + time.caption
    pair[1]["run"]["weights"] = "other"
    assert "of different models" in tradeoff_pictures(pair, NAMES)[0].caption
    pair[1]["results"]["perplexity"]["wikitext2"]["sha256"] = "other windows"
    titles = [picture.title for picture in tradeoff_pictures(pair, NAMES)]
    assert "Quality against time, wikitext2" not in titles  # never two of other windows in one


def test_what_forbids_a_comparison_is_said(pair):
    assert differences(pair, NAMES) == []
    pair[1]["run"] |= {"weights": "other", "model": "another", "precision": "bfloat16"}
    pair[1]["results"]["perplexity"]["wikitext2"]["sha256"] = "other windows"
    pair[1]["results"]["perplexity"]["c4"] = {"sha256": "x", "quantized": 2.0}
    model, windows, lacking, precision = differences(pair, NAMES)
    assert model.startswith("Different models: ") and "another (b)" in model
    assert windows == "Not the same windows of wikitext2: perplexities on it do not compare."
    assert lacking == "c4 was not measured of a."
    assert precision == "Measured in different precisions: float32 (a); bfloat16 (b)."


def test_settings_that_differ_are_named(pair):
    assert settings_that_differ(pair, NAMES).rows == []
    pair[1]["run"]["settings"] = {**pair[1]["run"]["settings"], "epochs": "7", "lr_plus": "True"}
    assert settings_that_differ(pair, NAMES).rows == [["epochs", "3", "7"]]


@pytest.fixture
def of_all_kinds(model_folder, report_data, tmp_path):
    """A run with its checkpoint, the model, and what evaluate left of it."""
    model = model_folder("llama")
    settings = {"data_dir": str(report_data), "seqlen": 16, "limit": 2, "ppl": ("wikitext2",)}
    settings |= {"precision": "float32"}
    quantize(
        str(model),
        "W4A16g16",
        output_dir=str(tmp_path / "run"),
        save_dir=str(tmp_path / "packed"),
        **{"nsamples": 2, "epochs": 1, "compare": True, **settings},
    )
    evaluate(str(model), output_dir=str(tmp_path / "measured"), **settings)
    return [
        str(path) for path in (tmp_path / "run", tmp_path / "packed", model, tmp_path / "measured")
    ]


def test_runs_checkpoints_models_and_results(of_all_kinds, tmp_path):
    run, packed, model, measured = with_known_weights([*map(compared_contents, of_all_kinds)])
    assert {each["run"]["weights"] for each in (run, packed, model, measured)} == {
        run["run"]["weights"]
    }
    ppl = [each["results"].get("perplexity", {}).get("wikitext2", {}) for each in (run, packed)]
    assert ppl[0]["quantized"] == ppl[1]["quantized"]
    full = measured["results"]["perplexity"]["wikitext2"]["full_precision"]
    assert full == pytest.approx(ppl[0]["full_precision"])
    sizes = [each["fits"]["formats"][each["fits"]["written"]]["bytes"] for each in (packed, model)]
    assert sizes[0] < sizes[1] and "lrquant evaluate" in model["missing"][0]
    page = write_comparison(of_all_kinds, tmp_path / "page.html").read_text()
    assert "4 models compared" in page and "Different models" not in page
    assert "Quality against size" in page and "wikitext2 was not measured of" in page


def test_a_damaged_checkpoint_is_refused(of_all_kinds, tmp_path):
    path = tmp_path / "packed" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 3.5}))
    with pytest.raises(LRQuantError, match=r"config\.json: .*; export the run again"):
        write_comparison(of_all_kinds[:2], tmp_path / "page.html")
