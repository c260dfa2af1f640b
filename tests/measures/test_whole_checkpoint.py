"""A checkpoint is loaded only whole: nothing made up, left out or put beside it."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lrquant import LRQuantError
from lrquant.config.groups import Computing
from lrquant.files.manifest import MANIFEST, SETTINGS
from lrquant.files.publishing import HASHES
from lrquant.measures.subjects.checkpoint import load_checkpoint

FORMATS = {
    "compressed-tensors": ("W4A16g16", {}),
    "bytes": ("W8A8-sym-qkv16", {"activation_symmetric": True}),
    "lrquant": ("W4A4g16", {"format": "lrquant"}),
    "dequantized": ("W4A16", {"format": "dequantized"}),
}


@pytest.fixture(params=FORMATS)
def checkpoint(request, saved, tiny_tokenizer):
    scheme, settings = FORMATS[request.param]
    folder = saved("llama-tied", scheme, **settings)
    tiny_tokenizer.save_pretrained(folder)
    for path in folder.glob("tokenizer*.json"):  # the model came without one
        path.rename(folder.parent / path.name)
    return folder


@pytest.fixture
def foreign(checkpoint):
    """The same as of another project, with its tokenizer."""
    for name in (MANIFEST, SETTINGS):
        (checkpoint / name).unlink()
    for path in checkpoint.parent.glob("tokenizer*.json"):
        shutil.copy(path, checkpoint)
    return checkpoint


def load(folder):
    return load_checkpoint(str(folder), Computing("auto", "auto", "auto"))


def refused(folder, *words):
    with pytest.raises(LRQuantError) as error:
        load(folder)
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in (str(folder), *words)), text


def edit(path, **changes):
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: v for key, v in values.items() if v is not None}))


def rewrite(folder, change):
    """Change the tensors of a checkpoint's last block, and its index with them."""
    path, index = folder / "model-0001.safetensors", folder / "model.safetensors.index.json"
    tensors = change(load_file(path))
    save_file(tensors, path, metadata={"format": "pt"})
    values = json.loads(index.read_text())
    kept = {name: file for name, file in values["weight_map"].items() if file != path.name}
    values["weight_map"] = kept | dict.fromkeys(tensors, path.name)
    index.write_text(json.dumps(values))


def test_a_whole_checkpoint_is_loaded(foreign):
    ids = torch.arange(3, 19)[None]
    assert load(foreign).module(ids).logits.isfinite().all()


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_a_family_that_torchs_attention_does_not_hold_is_loaded(saved, token_ids, family):
    folder, ids = saved(family, "W4A4", format="lrquant"), token_ids(1, 12)
    with torch.no_grad():
        assert load(folder).module(ids).logits.isfinite().all()


def test_a_file_that_was_changed_is_refused(checkpoint):
    edit(checkpoint / "config.json", rms_norm_eps=1e-2)
    refused(checkpoint, "config.json", "export the run again")


@pytest.mark.parametrize("name", ["model.safetensors", "adapter_config.json", "tokenizer.json"])
def test_a_file_that_readers_would_take_is_refused(checkpoint, name):
    (checkpoint / name).write_text("{}")
    refused(checkpoint, name, "not of this checkpoint")


def test_an_edited_manifest_is_refused(checkpoint):
    edit(checkpoint / MANIFEST, scheme="W2A16")
    refused(checkpoint, "lrquant.json: changed since it was written")
    (checkpoint / MANIFEST).unlink()
    (checkpoint / MANIFEST).mkdir()
    refused(checkpoint, "lrquant.json")


@pytest.mark.parametrize("name", ["notes.txt", "LICENSE", ".gitattributes"])
def test_a_file_that_nobody_reads_may_lie_beside(checkpoint, name):
    (checkpoint / name).write_text("mine")
    (checkpoint / HASHES).unlink()  # by which an edited manifest is seen
    for path in checkpoint.parent.glob("tokenizer*.json"):
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        shutil.copy(path, checkpoint)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        manifest["files"][path.name] = {"bytes": path.stat().st_size, "sha256": digest}
        (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    load(checkpoint)


def test_without_its_quantization_no_random_weights_are_measured(foreign):
    values = json.loads((foreign / "config.json").read_text())
    if "quantization_config" not in values:
        pytest.skip("dense weights need none")
    edit(foreign / "config.json", quantization_config=None)
    refused(foreign)


def test_a_method_that_nobody_knows_is_not_left_out(foreign):
    edit(foreign / "config.json", quantization_config={"quant_method": "of-tomorrow"})
    refused(foreign)


def test_a_missing_tensor_is_named(foreign):
    norm = "model.layers.1.input_layernorm.weight"
    rewrite(foreign, lambda tensors: {n: t for n, t in tensors.items() if n != norm})
    refused(foreign, norm)


def test_a_tensor_that_is_left_over_is_named(foreign):
    name = "model.layers.1.self_attn.q_proj.correction"
    rewrite(foreign, lambda tensors: {**tensors, name: torch.ones(3)})
    refused(foreign, name)


def test_a_tensor_of_another_shape_is_refused(foreign):
    norm = "model.layers.1.input_layernorm.weight"
    rewrite(foreign, lambda tensors: {**tensors, norm: torch.ones(31)})
    refused(foreign)


def test_transforms_that_transformers_leaves_out_are_refused(foreign):
    values = json.loads((foreign / "config.json").read_text())
    quantization = values.get("quantization_config") or {"quant_method": "compressed-tensors"}
    quantization["transform_config"] = {"config_groups": {"R1": {}}}
    edit(foreign / "config.json", quantization_config=quantization)
    refused(foreign, "transform_config")


def test_an_adapter_beside_the_weights_is_refused(foreign):
    (foreign / "adapter_config.json").write_text("{}")
    refused(foreign, "adapter_config.json")
