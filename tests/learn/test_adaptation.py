"""Test-time adaptation: from the calibrated parameters, on the last blocks, under its own name."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from lrquant import LRQuantError, evaluate, quantize
from lrquant.learn.adaptation import Adaptation, adapted_to
from lrquant.learn.model import BlockLearning
from lrquant.learn.tuning import EndToEnd
from lrquant.measures.tables import results_table
from lrquant.runs.mends import AFTER_BLOCKS, mend_of

TEXT = " ".join(f"{number * number} is the square of {number}." for number in range(40))
BLOCKS = 3


@pytest.fixture
def data_dir(tmp_path):
    folder = tmp_path / "data"
    for name in ("wikitext2", "other"):
        (folder / name).mkdir(parents=True)
        for split in ("validation", "test"):
            (folder / name / f"{split}.txt").write_text(f"{name} {split}. {TEXT}")
    return folder


@pytest.fixture
def learn(model_folder, data_dir, tmp_path):
    folder = model_folder("llama", num_hidden_layers=BLOCKS)

    def run(**settings):
        defaults = {"nsamples": 2, "seqlen": 24, "limit": 4, "epochs": 1, "precision": "float32"}
        return quantize(
            folder,
            "W3A4",
            output_dir=str(tmp_path / "run"),
            data_dir=str(data_dir),
            **(defaults | {"ppl": ("wikitext2",), "overwrite": True, "report": False} | settings),
        )

    return run


def parameters(folder, kind="blocks"):
    return {path.name: load_file(path) for path in sorted((folder / kind).glob("*.safetensors"))}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("plus", [False, True])
def test_the_plain_result_and_the_calibrated_parameters_stay(learn, tmp_path, blocks, plus):
    plain = learn(lr_plus=plus)
    calibrated = parameters(tmp_path / "run")
    adapted = learn(lr_plus=plus, tta=True, tta_blocks=blocks, tta_epochs=8)
    kept = parameters(tmp_path / "run")
    assert kept.keys() == calibrated.keys() and all(same(kept[n], calibrated[n]) for n in kept)
    before, after = (run.results["perplexity"]["wikitext2"] for run in (plain, adapted))
    assert "test_time_adapted" not in before and after["quantized"] == before["quantized"]
    assert after["test_time_adapted"] != after["quantized"]
    learned = parameters(tmp_path / "run" / "adapted", "wikitext2")
    assert list(learned) == [f"{i:04d}.safetensors" for i in range(BLOCKS - blocks, BLOCKS)]
    assert not all(same(values, kept[name]) for name, values in learned.items())


def test_it_starts_from_the_calibrated_parameters_and_lowers_the_loss(learn, tmp_path, caplog):
    learn(tta=True, tta_epochs=8)
    (line,) = [line for line in caplog.messages if line.startswith("test-time adaptation")]
    before, after = (float(part) for part in line.partition("loss ")[2].split(" -> "))
    assert after < before
    learn(tta=True, tta_epochs=1, tta_let_lr=0.0, lwc_lr=0.0)
    name = f"{BLOCKS - 1:04d}.safetensors"
    adapted = parameters(tmp_path / "run" / "adapted", "wikitext2")[name]
    assert same(adapted, parameters(tmp_path / "run")[name]), "no step, so what was calibrated"


def test_the_last_block_sees_its_own_true_inputs(learn, tmp_path, monkeypatch):
    """Not the embedding's output, as in the published code."""
    from lrquant.learn import adaptation

    seen = []
    fit = adaptation.fit_in_groups

    def fitting(view, runner, data, *rest, **how):
        seen.append((data.index, data.inputs.states.clone(), data.targets[0].states.clone()))
        return fit(view, runner, data, *rest, **how)

    monkeypatch.setattr(adaptation, "fit_in_groups", fitting)
    run = learn(tta=True)
    ((index, inputs, targets),) = seen
    model = run.workbench.model
    ids = torch.tensor(
        model.tokenizer((tmp_path / "data/wikitext2/test.txt").read_text()).input_ids
    )
    windows = ids[: 4 * 24].view(4, 24)
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(model.folder)
    learned = run.load_model()

    def into_last(module, name):
        found = []
        block = module.model.layers[-1]
        register = block.register_forward_pre_hook if name == "in" else block.register_forward_hook
        handle = register(lambda module, args, *out: found.append(out[0] if out else args[0]))
        with torch.no_grad():
            module(windows)
        handle.remove()
        return found[0]

    assert index == BLOCKS - 1
    inputs, targets = (states.view(4, 24, -1) for states in (inputs, targets))
    torch.testing.assert_close(inputs, into_last(learned, "in"), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(targets, into_last(plain, "out"), rtol=1e-4, atol=1e-4)
    embedded = learned.model.embed_tokens(windows)
    assert (inputs - embedded).abs().mean() > 0.1 * embedded.abs().mean()


def test_a_second_block_reads_what_the_adapted_first_one_gives(learn, monkeypatch):
    """Advancing the stream with the calibrated parameters would be seen here."""
    from lrquant.learn import adaptation

    inputs = {}
    fit = adaptation.fit_in_groups

    def fitting(view, runner, data, *rest, **how):
        (rate,) = {each.rate for each in view.ingredients if each.name == "let"}
        inputs[rate, data.index] = data.inputs.states.clone()
        return fit(view, runner, data, *rest, **how)

    monkeypatch.setattr(adaptation, "fit_in_groups", fitting)
    settings = {"tta": True, "tta_blocks": 2, "keep_best": False}
    for rate in (0.0, 0.05):
        learn(tta_let_lr=rate, **settings)
    first, last = BLOCKS - 2, BLOCKS - 1
    assert torch.equal(inputs[0.0, first], inputs[0.05, first])
    assert not torch.equal(inputs[0.0, last], inputs[0.05, last])


def test_what_was_done_is_in_the_results(learn, tmp_path):
    results = learn(tta=True, tta_epochs=2, tta_let_lr=2e-3, lr_plus=True).results
    done = results["test_time_adaptation"]["wikitext2"]
    (block,) = done["blocks"]
    assert (done["epochs"], block["block"]) == (2, BLOCKS - 1)
    assert "(lr 0.002)" in done["learned"]
    assert block["final_loss"] <= block["initial_loss"] and block["non_finite"] == []
    path = tmp_path / "run" / "adapted" / "wikitext2" / f"{BLOCKS - 1:04d}.safetensors"
    path.unlink()
    from lrquant.blocks.variants import as_learned
    from lrquant.runs.folder import RunFolder

    folder = RunFolder.open(tmp_path / "run")
    bench = learn(tta=False).workbench
    with pytest.raises(LRQuantError, match=r"0002\.safetensors: missing"):
        as_learned(bench, folder, adapted_to("wikitext2", folder), last=1)(BLOCKS - 1)


def test_folders_of_stages_are_those_of_a_run():
    """What is there is claimed, and damage in it has a mend."""
    assert BlockLearning.name == "blocks" and {Adaptation.name, EndToEnd.name} == set(AFTER_BLOCKS)
    assert all(
        mend_of(f"{name}/x/0000.safetensors").endswith(AFTER_BLOCKS[name]) for name in AFTER_BLOCKS
    )


def test_each_text_has_its_own_parameters_and_a_run_can_be_adapted_later(learn, tmp_path):
    learn()
    results = evaluate(str(tmp_path / "run"), ppl=("wikitext2", "other"), tta=True, compare=True)
    assert all("test_time_adapted" in scores for scores in results["perplexity"].values())
    first, second = (
        parameters(tmp_path / "run" / "adapted", name)[f"{BLOCKS - 1:04d}.safetensors"]
        for name in ("wikitext2", "other")
    )
    assert not same(first, second)
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == results
    table = results_table(results)
    assert "LRQuant" in table and "adapted to this text (TTA)" in table
    again = evaluate(str(tmp_path / "run"), ppl=("wikitext2",))
    adapted = again["perplexity"]["wikitext2"]["test_time_adapted"]
    assert adapted == results["perplexity"]["wikitext2"]["test_time_adapted"], "kept beside it"


def test_what_stays_as_it_is_while_the_rest_is_adapted(learn, tmp_path):
    """Rounding and what was tuned end to end: the blocks before are those of the run."""
    learn(let=True, lwc=True, rounding=True, tune=True, tune_rounding=True)
    results = evaluate(str(tmp_path / "run"), ppl=("wikitext2",), tta=True)
    adapted = results["test_time_adaptation"]["wikitext2"]
    assert "rounding" not in adapted["learned"] and "end to end" not in adapted["learned"]
    scores = results["perplexity"]["wikitext2"]
    assert scores["test_time_adapted"] != scores["quantized"]
    name = f"{BLOCKS - 1:04d}.safetensors"
    (own,) = parameters(tmp_path / "run" / "adapted" / "wikitext2", "").values()
    tuned = parameters(tmp_path / "run" / "tuned", "model")[name]
    assert all(torch.equal(own[key], values) for key, values in tuned.items())


def test_the_rate_of_adapting_says_nothing_of_what_was_learned(learn, tmp_path):
    learn(let=True)
    again = {"resume": str(tmp_path / "run"), "overwrite": False, "let": True}
    results = learn(tta=True, tta_let_lr=3e-3, **again).results
    assert "(lr 0.003)" in results["test_time_adaptation"]["wikitext2"]["learned"]
    with pytest.raises(LRQuantError, match="its method let_lr differs"):
        learn(let_lr=3e-3, **again)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"epochs": 0}, "learns nothing that could be adapted"),
        ({"rounding": True, "lwc": False, "let": False}, "learns nothing that could be adapted"),
        ({"tta_blocks": BLOCKS + 1}, f"the model has {BLOCKS} blocks"),
        ({"ppl": ()}, "no text to adapt to"),
    ],
)
def test_what_cannot_be_adapted_is_refused_before_learning(learn, tmp_path, settings, said):
    with pytest.raises(LRQuantError, match=said):
        learn(tta=True, **settings)
    assert not (tmp_path / "run" / "blocks").exists()


def test_a_model_is_no_run(model_folder):
    with pytest.raises(LRQuantError, match=r"--tta .*: needs a run folder"):
        evaluate(str(model_folder("llama")), tta=True, ppl=("wikitext2",))


def test_an_adapted_block_is_kept_for_the_same_text_and_settings_alone(
    learn, tmp_path, monkeypatch
):
    from lrquant.learn import adaptation

    seen = []
    fit = adaptation.fit_in_groups
    monkeypatch.setattr(
        adaptation,
        "fit_in_groups",
        lambda *rest, **how: seen.append(rest[2].index) or fit(*rest, **how),
    )
    settings = {"ppl": ("wikitext2",), "tta": True, "tta_blocks": 2}
    learn()
    run = str(tmp_path / "run")
    first = evaluate(run, **settings)
    assert seen == [BLOCKS - 2, BLOCKS - 1]
    again = evaluate(run, **settings)
    assert len(seen) == 2 and again["perplexity"] == first["perplexity"]
    assert again["test_time_adaptation"] == first["test_time_adaptation"]
    place = tmp_path / "run" / "adapted" / "wikitext2"
    (place / f"{BLOCKS - 1:04d}.safetensors").unlink()
    assert evaluate(run, **settings)["perplexity"] == first["perplexity"]
    assert seen[2:] == [BLOCKS - 1], "gone on with"
    evaluate(run, **{**settings, "tta_epochs": 1})
    assert seen[3:] == [BLOCKS - 2, BLOCKS - 1], "under other settings it is learned again"
    evaluate(run, **{**settings, "tta_epochs": 1, "precision": "bfloat16"})
    assert seen[5:] == [BLOCKS - 2, BLOCKS - 1], "in another precision too"
    del seen[5:]
    evaluate(run, **{**settings, "tta_blocks": 1})
    assert seen[5:] == [BLOCKS - 1] and len(list(place.iterdir())) == 1
