"""The first lines of a report: what is lost and recovered, warnings, examples, where it runs."""

from __future__ import annotations

import copy
import json
import math

import pytest

from lrquant import evaluate
from lrquant.config.config import Config
from lrquant.reports.contents import run_contents
from lrquant.reports.decision import first_sentences, recovered, recovered_tile, warnings
from lrquant.reports.fitting import fitting_table, size_in_words
from lrquant.reports.repeat import measuring_commands, settings_said
from lrquant.runs.folder import RunFolder
from lrquant.runs.results import merge_results

THREE = {"full_precision": 8.0, "round_to_nearest": 16.0, "quantized": 8.0 * 2**0.25}


@pytest.fixture(scope="module")
def contents(full_run):
    return run_contents(full_run.folder)


@pytest.fixture
def changed(contents):
    return copy.deepcopy(contents)


def measured_on(changed, texts, **scores):
    entry = {"text": "t", "sha256": "s", "items": {"measured": 40, "of": 40, "unit": "windows"}}
    changed["results"] = {"perplexity": {text: entry | THREE | scores for text in texts}}
    return changed


def test_the_recovered_share_is_of_the_mean_loss():
    assert recovered(THREE) == pytest.approx(0.75)
    assert recovered({**THREE, "quantized": 32.0}) == pytest.approx(-1.0)
    assert recovered({**THREE, "round_to_nearest": 8.0}) is None
    assert recovered({**THREE, "quantized": math.inf}) is None
    assert recovered({"quantized": 8.0}) is None


def test_the_first_sentences_say_what_is_lost(changed):
    sentences = first_sentences(measured_on(changed, ["wikitext2"]))
    size, perplexity = sentences
    assert size.startswith("Size ") and "bits a weight" in size
    assert "8.000 in full precision, 9.514 with LRQuant+ (+18.9\N{NO-BREAK SPACE}%)" in perplexity
    assert perplexity.endswith("75\N{NO-BREAK SPACE}% of what round-to-nearest loses is recovered.")
    (worse,) = first_sentences(measured_on(changed, ["wikitext2"], quantized=20.0))[1:]
    assert worse.endswith("more is lost than round-to-nearest loses.")
    assert recovered_tile(changed["results"])[1] == "none"


def test_the_mean_divergence_has_its_standard_error(contents, full_run):
    scores = contents["results"]["agreement"]["wikitext2"]["quantized"]
    assert scores["kl_mean_stderr"] > 0
    (sentence,) = [s for s in first_sentences(contents) if s.startswith("KL")]
    assert " ± " in sentence and "± ?" not in sentence
    assert sentence in (full_run.folder.path / "report.html").read_text()
    plain = sentence.replace("\N{NO-BREAK SPACE}", " ")
    assert plain in (full_run.folder.path / "report.md").read_text()


def test_blocks_that_are_worse_or_kept_their_start(changed):
    for block in changed["blocks"]:
        block["figures"]["loss"] = {"round_to_nearest": 1.0, "learned": 0.5}
        block["best_epoch"] = 1
    changed["blocks"][1]["figures"]["loss"]["learned"] = 2.0
    changed["blocks"][2]["best_epoch"] = 0
    said = warnings(measured_on(changed, ["c4", "wikitext2"]))
    assert said == [
        "Loss above that of round-to-nearest in block 1, of 3.",
        "Nothing learned was better than the start in block 2: the start was kept.",
    ]


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["c4"], "Calibrated on wikitext2, measured on other text: c4."),
        (["wikitext2"], "Measured on no other kind of text than it was calibrated on (wikitext2)"),
        (["c4", "wikitext2"], None),
        ([], "Nothing was measured"),
    ],
)
def test_calibration_and_test_beside_each_other(changed, texts, said):
    changed["blocks"] = []
    lines = warnings(measured_on(changed, texts))
    assert len(lines) == (said is not None)
    assert said is None or lines[0].startswith(said)


def test_few_windows_few_items_and_packed_weights(changed):
    changed["blocks"], changed["run"]["unpacked_from"] = [], "Q4_1"
    measured_on(changed, ["c4", "wikitext2"])
    changed["results"]["perplexity"]["c4"]["items"] = {"measured": 4, "of": 9, "unit": "windows"}
    changed["results"]["tasks"] = {"piqa": {"items": {"measured": 50, "of": 1838}}}
    packed, windows, items = warnings(changed)
    assert "quantised already (Q4_1)" in packed
    assert windows == "Few windows: c4 was measured on 4."
    assert items == "Few items: piqa was measured on 50."


def test_a_run_without_warnings_says_so(copied, monkeypatch):
    monkeypatch.setattr("lrquant.reports.contents.warnings", lambda contents: [])
    from lrquant.reports.writing import write_report

    page = write_report(RunFolder.open(copied)).read_text()
    assert "None of the warnings" in page and "To be looked at" not in page


def test_formats_sizes_and_runtimes(contents):
    sizes, fits = contents["run"]["sizes"], contents["fits"]
    assert fits["written"] == "lrquant" and set(fits["formats"]) == set(sizes["formats"])
    own = sizes["formats"]["lrquant"]
    assert own["bytes"] > 0 and own["bits_per_weight"] > 4
    assert sizes["bfloat16_bytes"] == 2 * sizes["parameters"]
    table = fitting_table(fits)
    row = next(row for row in table.rows if row[0] == "lrquant")
    assert row[-1] == "as learned" and "–" in row
    assert "→" in size_in_words(fits, sizes)[0]
    assert size_in_words(fits, {}) is None


def test_examples_are_shown_and_can_be_left_out(full_run, older_run, make_run):
    page = (full_run.folder.path / "report.html").read_text()
    examples = json.loads((full_run.folder.path / "results.json").read_text())["examples"]
    assert len(examples) == 2 and examples[0]["prompt"] in page and "What it writes" in page
    assert set(examples[0]) == {"prompt", "full_precision", "quantized"}
    without = make_run("without", examples=False, epochs=1)
    assert "examples" not in json.loads((without.folder.path / "results.json").read_text())


def test_what_was_asked_later_is_repeated(copied, full_run, report_data):
    config = full_run.folder.config
    first = measuring_commands(config, json.loads((copied / "results.json").read_text()))
    assert first == []
    later = {"ppl": ["my, text", "c4"], "limit": 2, "compare": True}
    results = merge_results({"asked": [later]}, {"asked": [later, {"tta": True}]})
    commands = measuring_commands(Config(model="m", output_dir="there/"), results)
    assert commands == [
        r"lrquant evaluate there-again --ppl 'my\, text,c4' --limit 2 --compare",
        "lrquant evaluate there-again --tta",
    ]


def test_an_evaluation_leaves_what_it_asked(model_folder, make_run, report_data, tmp_path):
    from lrquant import quantize

    settings = {"nsamples": 2, "seqlen": 16, "epochs": 1, "precision": "float32", "limit": 2}
    run = quantize(
        str(model_folder("llama")),
        "W4A16",
        output_dir=str(tmp_path / "run"),
        data_dir=str(report_data),
        ppl=("wikitext2",),
        **settings,
    )
    path = run.folder.path
    evaluate(str(path), ppl=("wikitext2",), limit=2)
    assert "asked" not in json.loads((path / "results.json").read_text())
    for _ in range(2):
        evaluate(str(path), ppl=("wikitext2",), limit=3, compare=True)
    asked = {"ppl": ["wikitext2"], "limit": 3, "compare": True}
    assert json.loads((path / "results.json").read_text())["asked"] == [asked]
    command = "run-again --ppl wikitext2 --compare --limit 3"
    assert command in (path / "report.html").read_text()
    assert command in (path / "report.md").read_text()


def test_settings_that_are_not_the_default():
    config = Config(model="m", scheme="W4A16g64", ppl=("a", "b"), output_dir="there").resolved()
    said = settings_said(config)
    assert said["ppl"] == "a, b" and said["scheme"] == "W4A16g64" and "output_dir" not in said
