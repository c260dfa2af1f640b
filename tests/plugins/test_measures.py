"""The contract of a measure, over every one here and the one of the page."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import lrquant
from lrquant.config.config import Config, measured_settings
from lrquant.errors import LRQuantError
from lrquant.measures.choice import check_measures, measures, measures_anything
from lrquant.measures.evaluation.resolution import no_measures
from lrquant.measures.measure import ModuleMeasure, TextMeasure
from lrquant.preflight.checks import preflight
from lrquant.runs.results import merge_results

PAGE = "add-a-measure.md"
ABSENT = {  # settings that ask for a set that is not there
    "perplexity": {"ppl": ("nowhere",)},
    "agreement": {"agreement": ("nowhere",)},
    "vqa": {"vqa": ("nowhere.jsonl",)},
    "classification": {"classify": "nowhere"},
    "tasks": {"tasks": "nowhere"},
    "accuracy": {"next_token": ("nowhere",)},
}
EVERY = pytest.mark.parametrize("name", ABSENT)


@pytest.fixture
def measure(toys):
    own = {each.name: each for each in measures()}

    def find(name: str):
        return own[name] if name in own else toys(PAGE).MEASURE

    return find


def test_every_measure_of_this_package_is_asked():
    assert {each.name for each in measures()} == ABSENT.keys() - {"accuracy"}


@EVERY
def test_settings_are_its_own_and_ask_for_nothing_by_default(name, measure):
    each = measure(name)
    own = {entry.name: entry for entry in dataclasses.fields(each.settings)}
    assert {*each.asked_by, *each.of_one_command} <= own.keys() and each.asked_by
    assert all(entry.metadata["help"] for entry in own.values())
    assert not any(own[asking].default for asking in each.asked_by)
    assert isinstance(each, TextMeasure | ModuleMeasure) and each.name in each.kinds
    with pytest.raises(dataclasses.FrozenInstanceError):
        each.settings().anything = 1


@pytest.mark.parametrize("name", [name for name in ABSENT if name != "accuracy"])
def test_a_set_that_is_not_there_is_refused_before_learning(name, model_folder, tmp_path):
    folder = model_folder("llama")
    settings = {"wbits": 4, "output_dir": str(tmp_path / "run"), "data_dir": str(tmp_path)}
    settings |= {"nsamples": 1, "seqlen": 8, "calib_dataset": str(tmp_path / "text.txt")}
    (tmp_path / "text.txt").write_text("a text to calibrate on " * 20)
    assert not measures_anything(Config(model=str(folder), **settings))
    settings |= {"model": str(folder), **ABSENT[name]}
    assert measures_anything(Config(**settings))
    failed = [finding.text for finding in preflight(settings).failed]
    with pytest.raises(LRQuantError) as raised:
        lrquant.quantize(**settings)
    assert str(raised.value) in failed and not (tmp_path / "run").exists()


def test_what_asks_is_forgotten_where_a_run_is_measured_anew():
    asking = {name for each in measures() for name in each.asked_by}
    assert asking <= no_measures().keys()
    check_measures(Config(model="m", **no_measures()))
    kinds = measured_settings()
    assert len(set(kinds)) == len(kinds) == len(measures())


def test_what_a_measure_that_is_gone_has_measured_is_kept():
    entry = {"text": "wikitext2, 2 windows", "sha256": "00", "quantized": {"first": 0.25}}
    old = {"model": "m", "scheme": "W4A4", "accuracy": {"wikitext2": entry}}
    other = {"text": "wikitext2, 2 windows", "sha256": "00", "quantized": 9.0}
    new = {"model": "m", "scheme": "W4A4", "perplexity": {"wikitext2": other}}
    merged = merge_results(old, new)
    assert merged["accuracy"] == {"wikitext2": entry}
    assert merged["perplexity"] == {"wikitext2": other}


RUN = """
import json, sys
from lrquant import LRQuantError, evaluate, quantize
model, data, output, saved = sys.argv[1:]
how = {"data_dir": data, "seqlen": 24, "limit": 4, "precision": "float32"}
try:
    quantize(model, "W2A16g16", next_token=("nowhere",), output_dir=output, **how)
except LRQuantError as error:
    print(json.dumps(str(error)))
run = quantize(model, "W2A16g16", next_token=("wikitext2",), compare=True, epochs=1, nsamples=2,
               output_dir=output, report=True, save_dir=saved, format="dequantized", **how)
print(json.dumps(run.results["accuracy"]["wikitext2"]))
print(json.dumps(evaluate(saved, next_token=("wikitext2",), **how)["accuracy"]["wikitext2"]))
both = evaluate(output, ppl=("wikitext2",), **how)
print(json.dumps([both["accuracy"]["wikitext2"], "wikitext2" in both["perplexity"]]))
"""


@pytest.fixture
def child(installed):
    """child(words) -> the output of a process that has the package: settings come with it."""
    place = installed(PAGE)
    paths = os.pathsep.join([str(place), str(Path(lrquant.__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}

    def run(*words: str) -> str:
        process = subprocess.run(
            [sys.executable, *words], env=environment, capture_output=True, text=True, check=False
        )
        assert process.returncode == 0, process.stderr
        return process.stdout

    return run


def test_a_run_and_its_checkpoint_with_the_one_of_the_page(
    child, model_folder, data_dir, text, tiny_tokenizer, tmp_path
):
    folder, run, saved = model_folder("llama"), tmp_path / "run", tmp_path / "saved"
    told = child("-c", RUN, str(folder), data_dir, str(run), str(saved)).splitlines()
    refusal, learned, exported, both = map(json.loads, told)
    assert "nowhere" in refusal
    assert both == [learned, True], "a later measure of the same text keeps the earlier one"
    ids = torch.tensor(tiny_tokenizer(text).input_ids)[: 4 * 24].view(4, 24)
    for place, entry in ((folder, learned["full_precision"]), (saved, exported["quantized"])):
        module = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
        with torch.no_grad():
            likely = module(ids).logits[:, :-1].topk(5).indices == ids[:, 1:, None]
        assert entry["first"] == pytest.approx(float(likely[..., 0].double().mean()))
        assert entry["five"] == pytest.approx(float(likely.any(-1).double().mean()))
    assert learned["quantized"] == pytest.approx(exported["quantized"])
    assert {"full_precision", "round_to_nearest", "quantized"} <= learned.keys()
    assert "Next token" in (run / "report.html").read_text()
    assert "is the likeliest" in (run / "report.md").read_text()
    assert "--next-token" in child("-m", "lrquant", "quantize", "--help")
    table = child(
        *("-m", "lrquant", "evaluate", str(saved), "--next-token", "wikitext2"),
        *("--data-dir", data_dir, "--seqlen", "24", "--limit", "4"),
    )
    assert "next token" in table and "wikitext2, is among five" in table
    checked = child(
        *(
            "-m",
            "lrquant",
            "check",
            "--model",
            str(folder),
            "--scheme",
            "W4A16",
            "--next-token",
            "wikitext2",
        ),
        *("--data-dir", data_dir, "--seqlen", "24", "--nsamples", "2", "--output_dir", str(run)),
        "--overwrite",
    )
    assert "wikitext2" in checked
