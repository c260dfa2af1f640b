"""A measure of another package, the one of the page: every command and the contract take it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PAGE = "add-a-measure.md"
CONTRACT = Path(__file__).parents[1] / "measures" / "test_contract.py"
SETTINGS = ("--guesses", "wikitext2", "--seqlen", "24", "--limit", "4", "--precision", "float32")

LATER = """
import json, sys
from pathlib import Path
from lrquant.measures.tables import results_table
from lrquant.runs.results import merge_results
path = Path(sys.argv[1]) / "results.json"
results = json.loads(path.read_text())
more = {"scheme": "W4A16", "perplexity": {"c4": {"text": "c4", "quantized": 9.0}}}
path.write_text(json.dumps(merge_results(results, results | more)))
print(results_table(json.loads(path.read_text())))
"""


@pytest.fixture
def child(installed, process):
    """child(words) -> what a process says that has the package of the page; it must end with 0.

    With `without`, one that has it not.
    """
    place = installed(PAGE)

    def run(*words: str, without: bool = False) -> str:
        ended = process(words, None if without else place)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    return run


@torch.no_grad()
def right_guesses(model, text):
    """The share by transformers alone, over the first 4 windows of 24 tokens."""
    ids = AutoTokenizer.from_pretrained(model)(text, return_tensors="pt").input_ids[0]
    windows = ids[: 4 * 24].view(4, 24)
    guesses = AutoModelForCausalLM.from_pretrained(model)(windows).logits[:, :-1].argmax(-1)
    return float((guesses == windows[:, 1:]).double().mean())


def test_every_command_takes_it(child, model_folder, data_dir, text, tmp_path):
    model, run, saved = model_folder("llama"), tmp_path / "run", tmp_path / "saved"
    asked = (*SETTINGS, "--data_dir", data_dir)
    learning = ("--model", model, "--scheme", "W2A16g16", "--nsamples", "2", "--epochs", "1")
    learning += ("--output_dir", run, "--save_dir", saved, "--format", "dequantized")
    said = child("-m", "lrquant", "check", *learning, *asked)
    assert "4 x 24 = 96 tokens" in said
    said = child("-m", "lrquant", "quantize", *learning, *asked, "--compare")
    assert "| guesses, W2A16g16" in said
    results = json.loads((run / "results.json").read_text())
    entry = results["guesses"]["wikitext2"]
    assert entry["full_precision"]["right"] == pytest.approx(right_guesses(model, text))
    assert "right_stderr" in entry["quantized"] and entry["items"]["measured"] == 4
    assert "guesses" in (run / "report.md").read_text().lower()
    assert "wikitext2, right first guesses" in (saved / "README.md").read_text()
    for target in (saved, model):
        said = child("-m", "lrquant", "evaluate", target, *asked)
        assert "wikitext2, right first guesses, n = 4 of" in said
    child("-m", "lrquant", "evaluate", run, *asked, "--limit", "3")
    later = json.loads((run / "results.json").read_text())
    assert later["others"]["guesses"]["wikitext2"] == [entry], "nothing is lost"


def test_a_package_that_has_gone_leaves_what_it_measured(child, model_folder, data_dir, tmp_path):
    """Whoever opens the folder without it keeps the entries, though no table shows them."""
    run = tmp_path / "run"
    learning = ("--model", model_folder("llama"), "--scheme", "W4A16", "--nsamples", "2")
    learning += ("--epochs", "0", "--output_dir", run, "--no-report", "--data_dir", data_dir)
    child("-m", "lrquant", "quantize", *learning, *SETTINGS)
    target = ("-m", "lrquant", "inspect", run)
    assert "guesses" in child(*target)
    with pytest.raises(AssertionError, match="'guesses'; install the package that declares it"):
        child(*target, without=True)
    before = json.loads((run / "results.json").read_text())["guesses"]
    said = child("-c", LATER, run, without=True)
    assert "guesses" not in said and "perplexity" in said
    assert json.loads((run / "results.json").read_text())["guesses"] == before


def test_a_run_that_did_not_use_it_needs_no_package(child, model_folder, data_dir, tmp_path):
    learning = ("--model", model_folder("llama"), "--scheme", "W4A16", "--nsamples", "2")
    places = ("--output_dir", tmp_path / "run", "--save_dir", tmp_path / "saved")
    how = ("--epochs", "0", "--no-report", "--data_dir", data_dir, "--seqlen", "24")
    child("-m", "lrquant", "quantize", *learning, *places, *how)
    for folder in ("run", "saved"):
        assert "weights 4 bits" in child(
            "-m", "lrquant", "inspect", tmp_path / folder, without=True
        )


def test_it_keeps_the_contract(child):
    said = child("-m", "pytest", "-q", "-p", "no:cacheprovider", CONTRACT, "-k", "guesses")
    assert " passed" in said or said.strip().endswith("[100%]")
