"""The plain checkpoint: transformers alone computes what was learned; nothing half is left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lrquant import LRQuantError, export, quantize
from lrquant.blocks.plan import Plan, learned_by
from lrquant.config.config import Config
from lrquant.config.scheme import Scheme
from lrquant.config.schemes import Schemes
from lrquant.files.manifest import SETTINGS
from lrquant.formats import checkpoint
from lrquant.formats.checkpoint import INDEX, check_format, save_checkpoint
from lrquant.formats.choice import choose_format
from lrquant.model.loading import from_module, load_model


@pytest.fixture
def learn(make_model, token_ids, tmp_path):
    def run(family, scheme, **settings):
        return quantize(
            settings.pop("model", None) or make_model(family),
            scheme,
            calibration=token_ids(3, 16),
            output_dir=str(tmp_path / "run"),
            **{"epochs": 3, "precision": "float32", "overwrite": True, "report": False},
            **{"format": "dequantized", **settings},
        )

    return run


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


def loaded(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__module__.startswith("transformers.models.")
    return model


@pytest.mark.parametrize(
    ("family", "scheme", "settings"),
    [
        ("llama", "W4A16", {"lwc": True}),
        ("llama", "W3A16g16", {"lwc": True}),
        ("llama", "W3A16g16", {"lwc": True, "let": True}),
        ("llama", "W3A16g16", {"lwc": True, "let": True, "lr_plus": True}),
        ("llama", "W3A16", {"lwc": True, "lr_plus": True, "rotation_sharing": "linear"}),
        ("llama-tied", "W3A16", {"lwc": True, "lr_plus": True, "rotate_rank": 3}),
        ("opt", "W4A16", {"lwc": True, "let": True, "lr_plus": True}),
        ("qwen3", "W2A16g16", {"rotation": True, "lwc": True}),
        ("llama-tied", "W4A16", {"lwc": True, "let": True}),
        ("llama-biases", "W4A16-sym", {"let": True}),
        ("qwen3", "W3A16g16", {"let": True}),
        ("qwen2", "W4A16", {"let": True, "let_sites": ("norm", "up_down")}),
        ("opt", "W4A16", {"lwc": True, "let": True}),
        ("opt-post-norm", "W4A16", {"let": True, "let_sites": ("value_output", "up_down")}),
    ],
    ids=str,
)
def test_transformers_alone_computes_what_was_learned(
    learn, make_model, token_ids, tmp_path, family, scheme, settings
):
    run = learn(family, scheme, save_dir=str(tmp_path / "saved"), **settings)
    saved, ids = loaded(tmp_path / "saved"), token_ids(2, 20)
    learned = logits(run.load_model(), ids)
    torch.testing.assert_close(logits(saved, ids), learned, rtol=1e-4, atol=1e-4)
    plain = logits(make_model(family), ids)
    assert not torch.allclose(plain, learned, rtol=1e-2, atol=1e-2), "nothing was quantised"
    tied = saved.get_input_embeddings().weight is saved.get_output_embeddings().weight
    assert tied == saved.config.tie_word_embeddings


def test_opt_has_learned_shifts_in_it(learn, token_ids, tmp_path):
    run = learn("opt", "W4A16", let=True, save_dir=str(tmp_path / "saved"))
    shifts = [n for n in run.folder.load_block(0) if n.endswith(".shift")]
    assert len(shifts) == 3
    assert all(run.folder.load_block(0)[name].abs().max() > 1e-3 for name in shifts)
    names = set(json.loads((tmp_path / "saved" / INDEX).read_text())["weight_map"])
    assert names == set(loaded(tmp_path / "saved").state_dict()) - {"lm_head.weight"}, "tied"


def test_weights_lie_on_the_grid(learn, tmp_path):
    learn("llama", "W2A16", lwc=True, save_dir=str(tmp_path / "saved"))
    for layer in loaded(tmp_path / "saved").model.layers:
        for row in layer.self_attn.q_proj.weight:
            assert len(row.unique()) <= 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_checkpoint_keeps_tokenizer_dtype_and_settings(
    model_folder, make_model, tmp_path, token_ids, dtype
):
    folder = model_folder("llama")
    make_model("llama", dtype).save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": true}')
    (tmp_path / "text.txt").write_text("some words, and some more of them. " * 20)
    settings = {"nsamples": 2, "seqlen": 16, "epochs": 1, "calib_dataset": tmp_path / "text.txt"}
    settings |= {"output_dir": tmp_path / "run", "save_dir": tmp_path / "deep" / "saved"}
    settings |= {"format": "dequantized", "report": False}
    run = quantize(folder, "W4A16", **settings)
    target = tmp_path / "deep" / "saved"
    assert Config.from_yaml(target / SETTINGS) == run.config
    assert (
        AutoTokenizer.from_pretrained(target)("any text").input_ids
        == run.workbench.model.tokenizer("any text").input_ids
    )
    assert json.loads((target / "generation_config.json").read_text())["temperature"] == 0.5
    assert AutoModelForCausalLM.from_pretrained(target, dtype="auto").dtype == dtype
    assert json.loads((target / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    with pytest.raises(LRQuantError, match=r"already quantised, by this project.*from model-llama"):
        load_model(str(target))
    assert [path.name for path in target.parent.iterdir()] == ["saved"]


def test_a_checkpoint_replaces_an_older_one_of_ours_only(learn, tmp_path, monkeypatch):
    saved = tmp_path / "saved"
    learn("llama", "W4A16", save_dir=str(saved))
    shard = saved / "model-0000.safetensors"
    shard.rename(saved / "model-0009.safetensors")
    with pytest.raises(LRQuantError, match=r"model-0009\.safetensors is not of the checkpoint"):
        learn("llama", "W3A16", save_dir=str(saved))
    (saved / "model-0009.safetensors").rename(shard)
    card = (saved / "README.md").read_text()
    (saved / "README.md").write_text(card + "my own notes")
    with pytest.raises(LRQuantError, match=r"README\.md was changed since"):
        learn("llama", "W3A16", save_dir=str(saved))
    (saved / "README.md").write_text(card)
    with pytest.raises(LRQuantError, match="holds a checkpoint; replace it with --overwrite"):
        export(str(tmp_path / "run"), str(saved))
    assert Config.from_yaml(saved / SETTINGS).scheme == "W4A16"
    learn("llama", "W3A16", save_dir=str(saved))
    assert Config.from_yaml(saved / SETTINGS).scheme == "W3A16"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "saved"]
    for name in ("home", "file"):
        path = tmp_path / name
        path.mkdir() if name == "home" else path.write_text("mine")
        if name == "home":
            (path / "thesis.tex").write_text("mine")
        with pytest.raises(LRQuantError, match=f"--save_dir {path}"):
            learn("llama", "W4A16", save_dir=str(path))
    assert (tmp_path / "home" / "thesis.tex").read_text() == "mine"
    assert (tmp_path / "file").read_text() == "mine"
    monkeypatch.chdir(tmp_path / "home")
    with pytest.raises(LRQuantError, match=r"--save_dir \.: is, or holds, the current"):
        learn("llama", "W4A16", save_dir=".")
    with pytest.raises(LRQuantError, match="this is the run folder"):
        learn("llama", "W4A16", save_dir=str(tmp_path / "home" / ".." / "run"))
    assert Config.from_yaml(tmp_path / "run" / "config.yaml").scheme == "W3A16"


def test_a_run_is_not_replaced_by_its_checkpoint(learn, tmp_path):
    run = learn("llama", "W4A16")
    with pytest.raises(LRQuantError, match="holds files that are no checkpoint"):
        elsewhere = Config(model="m", output_dir=str(tmp_path / "elsewhere"))
        form = choose_format(run.workbench.plan, run.config.format, None)
        save_checkpoint(run.workbench, elsewhere.origin, run.folder, run.folder.path, form)
    assert run.folder.finished_blocks() == 2


@pytest.mark.parametrize("call", [0, 1, 2])
def test_a_full_disk_leaves_no_folder(learn, tmp_path, monkeypatch, call):
    calls, save = [], checkpoint.save_file

    def full(tensors, path, **rest):
        calls.append(path)
        if len(calls) > call:
            Path(path).write_bytes(b"half a file")
            raise OSError(28, "No space left on device")
        save(tensors, path, **rest)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(LRQuantError) as error:
        learn("llama", "W4A16", save_dir=str(tmp_path / "saved"))
    assert str(tmp_path / "saved") in str(error.value) and "No space left" in str(error.value)
    assert "--save_dir" in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    assert len(calls) == call + 1


def test_a_full_disk_keeps_the_older_checkpoint(learn, tmp_path, monkeypatch):
    learn("llama", "W4A16", save_dir=str(tmp_path / "saved"))

    def full(*arguments, **rest):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(LRQuantError, match="No space left"):
        learn("llama", "W3A16", save_dir=str(tmp_path / "saved"))
    assert Config.from_yaml(tmp_path / "saved" / SETTINGS).scheme == "W4A16"


def test_a_damaged_run_leaves_no_folder(learn, tmp_path):
    run = learn("llama", "W4A16")
    run.folder.block_path(1).write_bytes(b"x")
    with pytest.raises(LRQuantError, match="changed or damaged"):
        form = choose_format(run.workbench.plan, run.config.format, None)
        save_checkpoint(run.workbench, run.config.origin, run.folder, tmp_path / "saved", form)
    assert not list(tmp_path.glob("saved*"))


@pytest.mark.parametrize(
    ("family", "lacking"),
    [("llama", "input_layernorm"), ("qwen2", "self_attn.o_proj"), ("opt-no-biases", "fc1")],
)
def test_biases_that_no_runtime_could_load_are_refused_before_learning(
    learn, tmp_path, family, lacking
):
    with pytest.raises(LRQuantError) as error:
        learn(family, "W4A16", let=True, let_shift="always", save_dir=str(tmp_path / "saved"))
    assert lacking in str(error.value) and "--let_shift auto" in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_shifts_everywhere_are_saved_where_every_module_has_a_bias(
    make_model, learn, token_ids, tmp_path
):
    run = learn("opt", "W4A16", let=True, let_shift="always", save_dir=str(tmp_path / "saved"))
    ids = token_ids(2, 20)
    learned = logits(run.load_model(), ids)
    torch.testing.assert_close(
        logits(loaded(tmp_path / "saved"), ids), learned, rtol=1e-4, atol=1e-4
    )
    learned = learned_by(let=True, let_shift="always", let_sites=("query_key",))
    plan = Plan(Schemes(Scheme(4)), learned)
    form = choose_format(run.workbench.plan, run.config.format, None)
    check_format(from_module(make_model("llama")), plan, form, torch.float32)
