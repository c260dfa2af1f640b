"""A run, its checkpoints and a floating-point model are measured in the same way."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from lrquant import LRQuantError, cli, evaluate, export, quantize
from lrquant.config.config import Config
from lrquant.files.manifest import MANIFEST
from lrquant.measures.rows import COLUMNS
from lrquant.measures.subjects import subject

QUICK = {"nsamples": 2, "seqlen": 24, "limit": 4, "epochs": 1, "precision": "float32"}
QUICK |= {"report": False}
MEASURED = {"ppl": ("wikitext2",), "seqlen": 24, "limit": 4, "precision": "float32"}


@pytest.fixture
def learn(model_folder, data_dir, tmp_path):
    folder = model_folder("llama")

    def run(scheme, **settings):
        output = {"output_dir": str(tmp_path / "run"), "data_dir": data_dir, "overwrite": True}
        return quantize(folder, scheme, **{**QUICK, **output, **settings})

    return run


def perplexity(target, data_dir, **settings):
    return evaluate(str(target), data_dir=data_dir, **{**MEASURED, **settings})["perplexity"][
        "wikitext2"
    ]


@pytest.mark.parametrize(
    ("scheme", "form"),
    [
        ("W3A16g16", "compressed-tensors"),
        ("W8A8-sym-qkv16", "compressed-tensors"),
        ("W3A16g16", "dequantized"),
        ("W4A4", "lrquant"),
    ],
)
def test_a_checkpoint_has_its_run_s_perplexity(learn, data_dir, tmp_path, scheme, form):
    run = learn(scheme, ppl=("wikitext2",), activation_symmetric="A8" in scheme)
    export(str(tmp_path / "run"), str(tmp_path / "saved"), format=form)
    learned = run.results["perplexity"]["wikitext2"]["quantized"]
    saved = perplexity(tmp_path / "saved", data_dir)
    assert saved.keys() & COLUMNS.keys() == {"quantized"}
    assert saved["quantized"] == pytest.approx(learned, rel=2e-3)
    full = perplexity(tmp_path / "model-llama", data_dir)["full_precision"]
    assert abs(full - learned) > 10 * abs(saved["quantized"] - learned), "or this tells nothing"


def test_a_checkpoint_is_scored_as_transformers_loads_it(
    learn, data_dir, tmp_path, tiny_tokenizer, text
):
    learn("W4A16", save_dir=str(tmp_path / "saved"))
    module = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = torch.tensor(tiny_tokenizer(text).input_ids)[: 4 * 24].view(4, 24)
    with torch.no_grad():
        logits = module(ids).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    found = perplexity(tmp_path / "saved", data_dir)["quantized"]
    assert found == pytest.approx(float(loss.exp()), rel=1e-4)


@pytest.mark.parametrize("base", ["model", "checkpoint", "run"])
def test_any_base_stands_beside_a_run(learn, data_dir, tmp_path, base):
    learn("W2A16", save_dir=str(tmp_path / "saved"))
    bases = {"model": "model-llama", "checkpoint": "saved", "run": "run"}
    place = tmp_path / bases[base]
    kept = (tmp_path / "run" / "run.json").read_bytes()
    scores = perplexity(tmp_path / "run", data_dir, compare=str(place))
    assert scores.keys() & COLUMNS.keys() == {"quantized", "base"}
    alone = perplexity(place, data_dir)
    assert scores["base"] == pytest.approx(alone.get("quantized", alone.get("full_precision")))
    same = scores["base"] == pytest.approx(scores["quantized"], rel=2e-3)
    assert same is (base != "model")
    assert (tmp_path / "run" / "run.json").read_bytes() == kept
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert "wikitext2" in results["perplexity"]


def test_a_base_beside_a_checkpoint_and_a_model(learn, data_dir, tmp_path):
    learn("W2A16", save_dir=str(tmp_path / "saved"))
    scores = perplexity(tmp_path / "saved", data_dir, compare=str(tmp_path / "model-llama"))
    assert (
        scores.keys() & COLUMNS.keys() == {"quantized", "base"}
        and scores["base"] != scores["quantized"]
    )
    scores = perplexity(tmp_path / "model-llama", data_dir, compare=str(tmp_path / "model-llama"))
    assert scores["base"] == scores["full_precision"]
    with pytest.raises(LRQuantError, match=r"--compare .*: needs a run folder; give what"):
        perplexity(tmp_path / "model-llama", data_dir, compare=True)


def test_a_checkpoint_is_loaded_without_bars_where_no_terminal_is(learn, data_dir, tmp_path, capfd):
    learn("W4A16", save_dir=str(tmp_path / "saved"))
    capfd.readouterr()
    perplexity(tmp_path / "saved", data_dir)
    assert capfd.readouterr() == ("", "") and logging.is_progress_bar_enabled()


class Harmful:
    """Unpickled, it writes a file."""

    def __init__(self, place):
        self.place = str(place)

    def __reduce__(self):
        return open, (self.place, "w")


def test_a_checkpoint_whose_weights_changed_is_refused(learn, data_dir, tmp_path):
    learn("W4A16", save_dir=str(tmp_path / "saved"))
    shard = tmp_path / "saved" / "model-0001.safetensors"
    whole = shard.read_bytes()
    edited = whole[:-1] + bytes([whole[-1] ^ 1])
    said = {whole[:100]: "100 bytes, ", edited: "changed since it was written", None: "missing"}
    for content, words in said.items():
        shard.unlink() if content is None else shard.write_bytes(content)
        with pytest.raises(LRQuantError, match=rf"saved: model-0001\.safetensors: {words}"):
            perplexity(tmp_path / "saved", data_dir)
    shard.write_bytes(whole)
    perplexity(tmp_path / "saved", data_dir)
    manifest = tmp_path / "saved" / MANIFEST
    manifest.write_text(manifest.read_text().replace('"version": 1', '"version": 2', 1))
    with pytest.raises(LRQuantError, match="version 2: this lrquant reads up to 1; update"):
        perplexity(tmp_path / "saved", data_dir)


def test_a_checkpoint_that_cannot_be_loaded(learn, data_dir, tmp_path):
    """Without a manifest, transformers says what is wrong; nothing is ever unpickled."""
    learn("W4A16", save_dir=str(tmp_path / "saved"))
    (tmp_path / "saved" / MANIFEST).unlink()
    shard = tmp_path / "saved" / "model-0001.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(LRQuantError, match=r"saved: the checkpoint cannot be read") as refused:
        perplexity(tmp_path / "saved", data_dir)
    assert "\n" not in str(refused.value)
    for path in (tmp_path / "saved").glob("*.safetensors*"):
        path.unlink()
    harmful = {"model.norm.weight": Harmful(tmp_path / "harmed")}
    torch.save(harmful, tmp_path / "saved" / "pytorch_model.bin")
    with pytest.raises(LRQuantError, match=r"saved: the checkpoint cannot be read") as refused:
        perplexity(tmp_path / "saved", data_dir)
    assert "\n" not in str(refused.value) and not (tmp_path / "harmed").exists()


def test_the_exit_code_says_whether_the_loss_is_acceptable(
    learn, harness, package, piqa_rows, data_dir, tmp_path, capsys
):
    """The labels are what the full-precision model prefers, so that any other model loses."""
    learn("W2A4", save_dir=str(tmp_path / "saved"), format="dequantized", let_init=1.0)
    run, model = tmp_path / "run", tmp_path / "model-llama"
    root = package(piqa_rows)
    first = {"tasks": "piqa", "data_dir": str(root), "output_dir": str(tmp_path / "first")}
    evaluate(str(model), **first)
    (path,) = (tmp_path / "first" / "tasks").iterdir()
    assert path.name.startswith("full_precision_")
    labelled = tmp_path / "labelled"
    rows = [
        row | {"label": label}
        for row, label in zip(piqa_rows, preferred(model, piqa_rows), strict=True)
    ]
    package(rows, name="labelled")

    def main(target, *flags):
        arguments = ["evaluate", target, "--tasks", "piqa", "--data_dir", labelled, *flags]
        code = cli.main(list(map(str, arguments)))
        return code, capsys.readouterr()

    capsys.readouterr()
    code, streams = main(run, "--compare", model, "--max-drop", "0")
    results = json.loads((run / "results.json").read_text())
    assert results["tasks"]["piqa"]["base"]["acc_norm,none"] == 1
    assert results["max_drop"]["drop"] > 0 and code == 1
    assert "MORE than the 0 allowed" in streams.out and streams.err == ""
    assert main(run, "--compare", model, "--max_drop", "1")[0] == 0
    assert main(run, "--compare", run, "--max-drop", "0")[0] == 0
    assert main(run, "--compare", "--max-drop", "0")[0] == 1, "against its own full precision"
    assert main(run, "--compare")[0] == 0, "nothing was said of what is acceptable"
    assert main(tmp_path / "saved", "--compare", model)[0] == 0
    code, streams = main(run, "--max-drop", "0")
    assert code == 2 and "give --compare too" in streams.err


def test_experts_of_a_run_are_made_as_when_it_was_learned(model_folder, monkeypatch):
    """Whatever the command's own settings say of groups."""
    config = Config(model=str(model_folder("qwen3_moe")), scheme="W4A16").resolved()
    opened = SimpleNamespace(
        config=replace(config, expert_group=2),
        require_finished=lambda: None,
        require_same=lambda values: None,
    )
    monkeypatch.setattr(subject.RunFolder, "open", lambda path: opened)
    monkeypatch.setattr(subject, "is_run", lambda path: True)
    assert subject.open_subject("run", config).workbench.by_expert
    opened.config = config
    assert not subject.open_subject("run", replace(config, expert_group=2)).workbench.by_expert


def preferred(folder, rows):
    """The choice of greater likelihood by length, as acc_norm has it."""
    from transformers import AutoTokenizer

    module = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    labels = []
    for row in rows:
        scores = []
        for choice in (row["sol1"], row["sol2"]):
            context = tokenizer(f"Question: {row['goal']}\nAnswer:").input_ids
            ids = torch.tensor([context + tokenizer(" " + choice).input_ids])
            with torch.no_grad():
                logits = module(ids).logits[0, :-1].log_softmax(-1)
            chosen = logits.gather(-1, ids[0, 1:, None])[len(context) - 1 :]
            scores.append(float(chosen.sum()) / len(choice))
        labels.append(int(scores[1] > scores[0]))
    return labels
