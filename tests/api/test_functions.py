"""The functions of the package: what commands do, on folders, runs and models in memory."""

from __future__ import annotations

import pickle
import pkgutil

import pytest
import torch

import lrquant
from lrquant import LRQuantError, Run, Scheme

QUICK = {"epochs": 1, "precision": "float32", "report": False, "nsamples": 2, "seqlen": 16}


@pytest.fixture(scope="module")
def data_dir(make_set):
    return str(make_set(lambda split, number: f"{split} {number * number}", 60))


@pytest.fixture(scope="module")
def model(make_model):
    return make_model("llama")


@pytest.fixture
def learned(model, tiny_tokenizer, data_dir, tmp_path):
    """A run of a model in memory."""
    return lrquant.quantize(
        model,
        "W4A16g16",
        tokenizer=tiny_tokenizer,
        output_dir=str(tmp_path / "run"),
        data_dir=data_dir,
        **QUICK,
    )


def test_no_public_name_is_a_subpackage():
    """One that is imported would stand in the name's place."""
    modules = {each.name for each in pkgutil.iter_modules(lrquant.__path__)}
    assert modules.isdisjoint(lrquant.__all__) and {"api", "formats", "reports"} <= modules


def test_a_run_of_a_model_in_memory_is_saved_measured_and_asked(learned, model, tmp_path):
    saved = learned.save(tmp_path / "saved", format="dequantized")
    results = learned.evaluate(ppl="wikitext2", limit=2)
    assert results["perplexity"]["wikitext2"]["quantized"] > 1 and learned.results is results
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        ours, theirs = lrquant.load(learned)(ids).logits, lrquant.load(saved)(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert (ours - model(ids).logits).abs().max() > 1e-3


def test_a_run_writes_text(learned):
    said = learned.generate("some words", max_tokens=4, temperature=0)
    assert said == learned.generate([{"role": "user", "content": "some words"}], max_tokens=4)
    torch.manual_seed(5)
    drawn = {learned.generate("x", max_tokens=4, temperature=2.0, seed=seed) for seed in range(4)}
    assert len(drawn) > 1 and torch.initial_seed() == 5, "the caller's randomness is left alone"
    for wrong in ([], [{"role": "user"}]):
        with pytest.raises(LRQuantError, match="messages with a role"):
            learned.generate(wrong)
    with pytest.raises(LRQuantError, match="max_tokens 0"):
        learned.generate("x", max_tokens=0)


def test_a_run_is_opened_later_with_the_model_that_was_in_memory(
    learned, model, make_model, tiny_tokenizer, data_dir, tmp_path
):
    folder = tmp_path / "run"
    again = Run.open(folder, model, tiny_tokenizer)
    assert again.generate("a", max_tokens=3) == learned.generate("a", max_tokens=3)
    own = {"model": model, "tokenizer": tiny_tokenizer}
    results = lrquant.evaluate(folder, ppl="wikitext2", limit=2, data_dir=data_dir, **own)
    assert results["perplexity"]["wikitext2"]["quantized"] > 1
    saved = lrquant.export(folder, tmp_path / "saved", **own)
    assert (saved / "config.json").is_file()
    other = make_model("llama", num_hidden_layers=3)
    with pytest.raises(LRQuantError, match="model"):
        Run.open(folder, other, tiny_tokenizer)


def test_gradients_pass_through_the_model_of_a_run(model, token_ids, tmp_path):
    """So that adapters train on top of it."""
    ids = token_ids(2, 12)
    run = lrquant.quantize(
        model, "W4A4", calibration=ids, output_dir=str(tmp_path / "run"), **{**QUICK, "epochs": 0}
    )
    module = lrquant.load(run).requires_grad_(True)
    module(input_ids=ids, labels=ids).loss.backward()
    linears = [each for each in module.model.modules() if isinstance(each, torch.nn.Linear)]
    assert len(linears) == 14
    assert all(linear.weight.grad.abs().sum() > 0 for linear in linears)


def test_reading_functions(learned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = lrquant.inspect(learned)
    assert text.startswith("run ") and repr(text) == text
    assert lrquant.inspect("run").splitlines()[1:] == text.splitlines()[1:]
    assert text._repr_html_().startswith("<pre>run ") and pickle.loads(pickle.dumps(text)) == text
    assert lrquant.report(learned).name == "report.html"
    page = lrquant.compare([learned, "run"], tmp_path / "page.html")
    assert "runs compared" in page.read_text()
    with pytest.raises(LRQuantError, match="give a list"):
        lrquant.compare("run")


def test_a_run_shows_its_main_figures(learned):
    learned.evaluate(ppl="wikitext2", limit=2)
    learned.config.__dict__["net"] = "<b>"
    short, page = repr(learned), learned._repr_html_()
    assert short.startswith("<Run <b> W4A16g16 in ") and "wikitext2" in short
    assert "\n" not in short and len(short) < 400
    assert "&lt;b&gt;" in page and "wikitext2" in page and "learning time" in page
    assert "<b>" not in page and "report" not in page


def test_check_takes_what_quantize_takes(model, tmp_path):
    settings = {"output_dir": str(tmp_path / "run"), "seqlen": 16, "device": "cpu"}
    checked = lrquant.check(model, "W4A16g16", calibration=[[5, 6, 7, 8]], **settings)
    assert checked.passed and "given tokens, 1 x 4" in repr(checked)
    assert checked._repr_html_().startswith("<pre>model: ")
    wrong = lrquant.check(model, "W4A16g5", calibration=[[5, 6, 7, 8]], **settings)
    assert not wrong.passed and "does not divide" in " ".join(wrong.failed)
    assert not (tmp_path / "run").exists()


def test_a_scheme_is_taken_where_its_name_is(model, token_ids, tmp_path):
    ids, rest = token_ids(2, 16), {**QUICK, "epochs": 0}
    symmetric = Scheme(weight_bits=8, activation_bits=8, activation_symmetric=True)
    run = lrquant.quantize(
        model,
        symmetric,
        calibration=ids,
        scheme_for={"mlp.down_proj": Scheme(weight_bits=4), "o_proj": "W8A16"},
        output_dir=str(tmp_path / "run"),
        **rest,
    )
    assert run.config.scheme == "W8A8" and run.config.activation_symmetric
    assert run.config.scheme_for == ("mlp.down_proj=W4A16", "o_proj=W8A16")
    for odd in ({"activation_symmetric": False}, {"vision_scheme": Scheme(activation_bits=8)}):
        with pytest.raises(LRQuantError, match="activation_symmetric: schemes of one model"):
            lrquant.quantize(model, symmetric, calibration=ids, **odd)


def test_what_a_caller_can_mend(model, tiny_tokenizer, token_ids, tmp_path):
    with pytest.raises(LRQuantError, match="brings its own tokenizer"):
        lrquant.quantize("folder", "W4A16", tokenizer=tiny_tokenizer)
    with pytest.raises(LRQuantError, match="calibration and calib_dataset"):
        lrquant.quantize(model, "W4A16", calibration=token_ids(1, 8), calib_dataset="c4")
    with pytest.raises(LRQuantError, match="no run folder, so it has no other"):
        lrquant.evaluate(str(tmp_path), model=model)
    run = lrquant.quantize(
        model, "W4A16", calibration=token_ids(2, 8), output_dir=str(tmp_path / "run"), **QUICK
    )
    with pytest.raises(LRQuantError, match="no tokenizer, so it writes no text"):
        run.generate("x")
    saved = run.save(tmp_path / "saved", format="lrquant")
    assert lrquant.load(saved)(token_ids(1, 8)).logits.isfinite().all(), (
        "it has no tokenizer either"
    )
    with pytest.raises(LRQuantError, match="no tokenizer: perplexity needs one"):
        lrquant.evaluate(saved, ppl="wikitext2")


def test_the_docstring_lists_every_setting():
    text = lrquant.quantize.__doc__
    for line in ("calibration:", "  nsamples=128: calibration samples", "  keep_best=True:"):
        assert line in text
    assert max(map(len, text.splitlines())) <= 100
