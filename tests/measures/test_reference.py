"""Agreement of checkpoints and models with a full-precision model, against a run's own figure."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from lrquant import LRQuantError, evaluate, export, quantize
from lrquant.measures.rows import COLUMNS
from lrquant.measures.subjects import subject as subjects
from lrquant.measures.tables import results_table
from lrquant.model.model import Model

QUICK = {"nsamples": 2, "epochs": 1, "save_dtype": "float32", "report": False}
WINDOWS = {"seqlen": 24, "limit": 4, "precision": "float32", "agreement": ("wikitext2",)}


@pytest.fixture
def saved(model_folder, data_dir, tmp_path):
    """saved(scheme, format) -> a run, and its checkpoint in tmp_path / "saved"."""

    def make(scheme, form, layers=2, **settings):
        places = {"output_dir": str(tmp_path / "run"), "data_dir": data_dir}
        folder = model_folder("llama", num_hidden_layers=layers)
        run = quantize(folder, scheme, **{**QUICK, **WINDOWS, **places, **settings})
        export(str(tmp_path / "run"), str(tmp_path / "saved"), format=form)
        return run

    return make


@pytest.fixture
def measured(data_dir):
    def run(target, **settings):
        return evaluate(str(target), data_dir=data_dir, **{**WINDOWS, **settings})

    return run


def another_model(make_model, tiny_tokenizer, folder, seed):
    model = make_model("llama")
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("scheme", "form"),
    [
        ("W3A16g16", "compressed-tensors"),
        ("W8A8-sym-qkv16", "compressed-tensors"),
        ("W3A16g16", "dequantized"),
        ("W4A16", "awq"),
        ("W4A4", "lrquant"),
    ],
)
def test_a_checkpoint_agrees_as_its_run_does(
    saved, measured, make_model, tiny_tokenizer, tmp_path, scheme, form
):
    if form == "awq":
        pytest.importorskip("gptqmodel")
    run = saved(scheme, form, activation_symmetric="A8" in scheme)
    expected = run.results["agreement"]["wikitext2"]["quantized"]
    results = measured(tmp_path / "saved")
    columns = results["perplexity"]["wikitext2"].keys() & COLUMNS.keys()
    assert columns == {"full_precision", "quantized"}
    full = run.results["perplexity"]["wikitext2"]["full_precision"]
    assert results["perplexity"]["wikitext2"]["full_precision"] == full, "bit for bit"
    found = results["agreement"]["wikitext2"]["quantized"]
    for name in ("kl_mean", "kl_p99", "perplexity_ratio"):
        assert found[name] == pytest.approx(expected[name], rel=5e-3)
    assert found["same_top"] == pytest.approx(expected["same_top"], abs=0.03)
    spans = [(entry["first"], entry["last"]) for entry in found["positions"]]
    assert spans == [(e["first"], e["last"]) for e in expected["positions"]]
    other = another_model(make_model, tiny_tokenizer, tmp_path / "other", seed=1)
    apart = measured(tmp_path / "saved", compare=str(other))["agreement"]["wikitext2"]["quantized"]
    assert apart["kl_mean"] != pytest.approx(expected["kl_mean"], rel=0.05), "or this tells nothing"


def test_agreement_with_the_base_that_is_given(saved, measured, tmp_path):
    run = saved("W3A16g16", "compressed-tensors")
    results = measured(tmp_path / "saved", compare=str(tmp_path / "model-llama"))
    own = measured(tmp_path / "saved")
    scores = results["agreement"]["wikitext2"]
    assert scores["quantized"] == own["agreement"]["wikitext2"]["quantized"]
    assert (scores["reference"], own["agreement"]["wikitext2"]["reference"]) == (
        "base",
        "full_precision",
    )
    perplexities = results["perplexity"]["wikitext2"]
    assert perplexities.keys() & COLUMNS.keys() == {"quantized", "base"}
    assert perplexities["base"] == run.results["perplexity"]["wikitext2"]["full_precision"]
    ratio = perplexities["quantized"] / perplexities["base"]
    assert scores["quantized"]["perplexity_ratio"] == pytest.approx(ratio, rel=1e-5)
    assert "agreement with base" in results_table(results)
    assert "agreement with full precision" in results_table(own)


def test_a_quantised_base_is_no_reference(saved, measured, tmp_path):
    saved("W3A16g16", "compressed-tensors")
    results = measured(tmp_path / "saved", compare=str(tmp_path / "run"))
    columns = results["perplexity"]["wikitext2"].keys() & COLUMNS.keys()
    assert columns == {"full_precision", "quantized", "base"}
    own = measured(tmp_path / "saved")["agreement"]
    assert results["agreement"] == own, "with the checkpoint's own model"
    for quantised in ("saved", "run"):
        with pytest.raises(LRQuantError, match=f"{quantised} is quantised, .*model-llama is not"):
            measured(tmp_path / "model-llama", compare=str(tmp_path / quantised))


def test_two_models(measured, make_model, tiny_tokenizer, model_folder, tmp_path, text):
    model = model_folder("llama")
    same = measured(model, compare=str(model))["agreement"]["wikitext2"]["full_precision"]
    assert abs(same["kl_mean"]) < 1e-6 and same["same_top"] == 1
    other = another_model(make_model, tiny_tokenizer, tmp_path / "other", seed=1)
    results = measured(other, compare=str(model))
    found = results["agreement"]["wikitext2"]["full_precision"]
    ids = torch.tensor(tiny_tokenizer(text).input_ids)[: 4 * 24].view(4, 24)
    with torch.no_grad():
        mine, full = (
            AutoModelForCausalLM.from_pretrained(folder)(ids).logits[:, :-1].double()
            for folder in (other, model)
        )
    divergence = torch.nn.functional.kl_div(
        mine.log_softmax(-1), full.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    assert found["kl_mean"] == pytest.approx(float(divergence.mean()), rel=1e-3) != 0
    assert "wikitext2, n = 4 of 40, model" in results_table(results)
    with pytest.raises(LRQuantError, match=r"not a run or checkpoint; give .*--compare MODEL"):
        measured(model)


def test_a_checkpoint_whose_model_is_not_known(saved, measured, tmp_path, monkeypatch):
    saved("W3A16g16", "compressed-tensors")
    monkeypatch.setattr(subjects, "stored_checkpoint", lambda *a: pytest.fail("loaded already"))
    settings = tmp_path / "saved" / "lrquant.yaml"
    values = yaml.safe_load(settings.read_text())
    settings.write_text(yaml.safe_dump(values | {"model": "/moved/away"}))
    with pytest.raises(LRQuantError, match=r"made from /moved/away, .*give .*--compare MODEL"):
        measured(tmp_path / "saved")
    settings.unlink()
    with pytest.raises(LRQuantError, match=r"does not say what it was made from .*--compare MODEL"):
        measured(tmp_path / "saved")


def test_models_that_read_other_tokens(measured, model_folder, tmp_path):
    model, other = model_folder("llama"), model_folder("qwen2")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["square"])
    tokenizer.save_pretrained(other)
    with pytest.raises(LRQuantError, match=r"--agreement wikitext2: .*different tokens"):
        measured(model, compare=str(other))


def test_the_reference_is_read_block_by_block(saved, measured, tmp_path, monkeypatch):
    saved("W3A16g16", "compressed-tensors", layers=5)
    read, seen, most = Model.block_tensors, [], []

    def tensors(self, index, device):
        gc.collect()
        most.append(sum(one() is not None for one in seen))
        found = {name: tensor.clone() for name, tensor in read(self, index, device).items()}
        seen.extend(weakref.ref(tensor) for tensor in found.values())
        return found

    monkeypatch.setattr(Model, "block_tensors", tensors)
    measured(tmp_path / "saved")
    assert len(seen) == 5 * 9 and max(most) <= 9, "only the block before may still be there"
