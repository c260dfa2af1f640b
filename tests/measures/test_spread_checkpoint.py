"""A checkpoint over several places: the numbers of one that lies on one device."""

from __future__ import annotations

import gc
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lrquant import LRQuantError, evaluate, quantize
from lrquant.blocks import placement
from lrquant.blocks.placement import is_in
from lrquant.config.groups import Computing
from lrquant.formats.checkpoint import INDEX
from lrquant.measures.subjects import stored as stored_files
from lrquant.measures.subjects.checkpoint import loaded, stored_checkpoint

FORMATS = {
    "compressed-tensors": ("W4A16g16", {}),
    "bytes": ("W8A8-sym-qkv16", {"activation_symmetric": True}),
    "transforms": ("W4A16-hadamard", {"format": "compressed-tensors"}),
    "lrquant": ("W4A4g16", {"format": "lrquant"}),
    "dequantized": ("W4A16", {"format": "dequantized"}),
}
PLACED = [("llama", 0), ("qwen3_next-experts", 1)]
CPU = torch.device("cpu")
COMPUTING = Computing("cpu", "auto", "auto")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    pytest.importorskip("accelerate", reason="needs the extra lrquant[eval]")
    monkeypatch.setattr(placement, "_MAKING", 0)  # more than the tiny models have


@pytest.fixture
def stored(saved):
    """stored(family, format) -> a checkpoint of it; skipped where the format does not hold it."""

    def make(family, name):
        scheme, settings = FORMATS[name]
        try:
            folder = saved(family, scheme, **settings)
        except LRQuantError as error:
            pytest.skip(str(error))
        return stored_checkpoint(str(folder), COMPUTING)

    return make


def room_for(stored, blocks):
    """Bytes for so many blocks beside what else is kept in memory."""
    return {"cpu": stored.size.outer + sum(list(stored.size.blocks.values())[:blocks])}


def on_the_disk(module):
    """Paths of modules that have parameters there; those of compressed-tensors keep them apart."""
    paths = set()
    for path, each in module.named_modules():
        tensors = getattr(each._parameters, "offloaded_values", each._parameters)
        if any(tensor is not None and tensor.is_meta for tensor in tensors.values()):
            paths.add(path)
    return paths


def answers(module, ids):
    """Logits, and what is generated."""
    written = module.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    return module(ids).logits, written


@torch.no_grad()
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("family", "blocks"), PLACED)
def test_blocks_on_the_disk_compute_the_same(stored, token_ids, tmp_path, family, name, blocks):
    """The first so many of them are in memory."""
    checkpoint, ids = stored(family, name), token_ids(2, 12)
    expected = answers(loaded(checkpoint, CPU).module, ids)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    spread = loaded(checkpoint, CPU, scratch, room_for(checkpoint, blocks))
    assert spread.device == CPU
    module = spread.module
    del spread
    away, names = on_the_disk(module), checkpoint.block_names
    for index, block in enumerate(names):
        assert any(is_in(path, block) for path in away) == (index >= blocks)
    assert all(any(is_in(path, block) for block in names) for path in away)
    assert all(map(torch.equal, answers(module, ids), expected))
    assert len(list(scratch.iterdir())) == 1
    del module
    gc.collect()
    assert not list(scratch.iterdir()), "what was on the disk is gone with the model"


@pytest.fixture
def no_room(monkeypatch):
    """no_room() -> from then on no device has room for anything."""

    def begin():
        for module in (placement, stored_files):
            monkeypatch.setattr(module, "free_memory", lambda device: 0)
        monkeypatch.setattr(placement, "free_room", lambda device: {"cpu": 1})

    return begin


@pytest.mark.parametrize("name", ["bytes", "lrquant"])
def test_it_is_measured_alike(
    model_folder, token_ids, harness, package, piqa_rows, data_dir, tmp_path, no_room, caplog, name
):
    scheme, settings = FORMATS[name]
    folder = str(tmp_path / "saved")
    places = {"output_dir": str(tmp_path / "run"), "save_dir": folder, "report": False}
    settings = {"precision": "float32", "epochs": 0, **places, **settings}
    quantize(model_folder("llama"), scheme, calibration=token_ids(2, 16), **settings)
    texts = {"agreement": ("wikitext2",), "seqlen": 24, "limit": 4, "data_dir": data_dir}
    tasks = {"tasks": "piqa", "data_dir": str(package(piqa_rows))}
    expected = [evaluate(folder, device="cpu", **asked) for asked in (texts, tasks)]
    no_room()
    with caplog.at_level("INFO", logger="lrquant"):
        results = [evaluate(folder, device="cpu", **asked) for asked in (texts, tasks)]
    assert caplog.text.count(f"checkpoint {folder} needs 0.0 GB: 2 blocks on the disk") == 2
    for found, whole, kind in zip(results, expected, ("agreement", "tasks"), strict=True):
        assert found[kind] == whole[kind] != {}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_bytes_are_those_of_the_loaded_model(stored, family, name):
    checkpoint = stored(family, name)
    module = loaded(checkpoint, CPU).module
    with torch.no_grad():
        module(torch.ones((1, 4), dtype=torch.long))  # some unpack themselves before the first
    tensors = [*module.parameters(), *module.buffers()]
    exact = sum(tensor.numel() * tensor.itemsize for tensor in tensors)
    rel = 0 if name == "lrquant" else 0.1  # scales that others keep beside dense weights
    assert checkpoint.size.total == pytest.approx(exact, rel=rel)


def test_a_method_that_lies_on_one_device_is_refused(stored, no_room):
    checkpoint = stored("llama", "compressed-tensors")
    checkpoint.config.quantization_config["quant_method"] = "awq"
    assert checkpoint.placement(CPU) is None and checkpoint.fits(CPU)
    no_room()
    assert not checkpoint.fits(CPU)
    with pytest.raises(LRQuantError, match=r"and awq has to lie on one device; use a larger one"):
        loaded(checkpoint, CPU)


def test_a_tensor_that_the_files_lack_is_missed_on_the_disk_too(stored, tmp_path):
    checkpoint = stored("llama", "lrquant")
    path, index = checkpoint.folder / "model-0001.safetensors", checkpoint.folder / INDEX
    name = "model.layers.1.mlp.up_proj.weight_scale"
    tensors, values = load_file(path), json.loads(index.read_text())
    del tensors[name], values["weight_map"][name]
    save_file(tensors, path, metadata={"format": "pt"})
    index.write_text(json.dumps(values))
    with pytest.raises(LRQuantError, match=f"it has no {name}"):
        loaded(checkpoint, CPU, tmp_path, room_for(checkpoint, 0))
    assert not list(tmp_path.glob("whole-*"))
