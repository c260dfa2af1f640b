"""gpt-oss as it is published, its experts in MXFP4: read as transformers unpacks it itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mxfp4Config

from lrquant import quantize
from lrquant.errors import LRQuantError
from lrquant.files.manifest import SETTINGS
from lrquant.measures.subjects.checkpoint import is_checkpoint
from lrquant.model.loading import load_model
from lrquant.model.sources import SafetensorsSource
from lrquant.preflight.checks import preflight

EXPERTS = "model.layers.{}.mlp.experts.{}"
QUANTIZATION = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
}


@pytest.fixture
def published(model_folder) -> Path:
    """A tiny gpt-oss whose experts are random bytes and powers of 2."""
    folder = model_folder("gpt_oss", intermediate_size=32)
    stored = load_file(folder / "model.safetensors").items()
    tensors = {name: tensor.bfloat16() for name, tensor in stored}
    generator = torch.Generator().manual_seed(3)
    for block in range(2):
        for name in ("gate_up_proj", "down_proj"):
            weight = tensors.pop(EXPERTS.format(block, name))
            experts, columns, rows = weight.shape
            shape = experts, rows, columns // 32
            packed = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
            powers = torch.randint(120, 126, shape, generator=generator, dtype=torch.uint8)
            tensors[EXPERTS.format(block, f"{name}_blocks")] = packed
            tensors[EXPERTS.format(block, f"{name}_scales")] = powers
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": QUANTIZATION}), encoding="utf-8"
    )
    return folder


def test_weights_are_those_that_transformers_unpacks(published):
    expected = AutoModelForCausalLM.from_pretrained(
        published, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.bfloat16
    ).state_dict()
    model = load_model(str(published))
    assert model.source.unpacked_from() == "MXFP4"
    assert getattr(model.config, "quantization_config", None) is None
    assert model.source.names() >= expected.keys() and not model.source.extra_names()
    for name, tensor in expected.items():
        own = model.source.tensor(name)
        assert model.source.shape(name) == tuple(own.shape)
        assert torch.equal(own, tensor), name
        assert own.dtype == torch.bfloat16
    weight = expected[EXPERTS.format(0, "down_proj")]
    assert weight.unique().numel() > 30 and weight.shape == (4, 32, 32)


def test_it_is_measured_as_a_model_of_full_precision(published, tmp_path):
    assert not is_checkpoint(str(published), None)
    (published / SETTINGS).write_text("", encoding="utf-8")
    assert is_checkpoint(str(published), None), "by a run of this project"
    (published / SETTINGS).unlink()
    config = json.loads((published / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "gptq"
    (published / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert is_checkpoint(str(published), None)


def test_a_run_says_so_and_its_checkpoint_is_plain(published, tmp_path, token_ids, caplog):
    settings = {"model": str(published), "scheme": "W4A16g16", "nsamples": 1, "seqlen": 16}
    done = preflight(settings)
    assert any("unpacked from MXFP4" in each.text for each in done.findings)
    run = quantize(
        str(published),
        "W4A16g16",
        calibration=token_ids(2, 16),
        output_dir=str(tmp_path / "run"),
        epochs=1,
        expert_tokens=0,
    )
    assert "unpacked from MXFP4" in caplog.text
    assert "quantised already (MXFP4)" in (tmp_path / "run" / "report.md").read_text()
    run.save(tmp_path / "saved", format="dequantized")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "quantization_config" not in config
    _, told = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]


def test_what_is_not_whole_is_refused(published):
    path = published / "model.safetensors"
    tensors = load_file(path)
    name = EXPERTS.format(1, "down_proj_scales")
    save_file({**tensors, name: tensors[name][:, :-1].clone()}, path)
    with pytest.raises(LRQuantError, match=r"down_proj: blocks .* are no MXFP4 weight"):
        load_model(str(published))
    save_file({n: t for n, t in tensors.items() if n != name}, path)
    with pytest.raises(LRQuantError, match="tensors are missing"):
        load_model(str(published))


def test_both_parts_of_a_weight_are_read_ahead(published, monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr(SafetensorsSource, "read_ahead", lambda self, names: asked.extend(names))
    load_model(str(published)).read_ahead(1)
    names = load_file(published / "model.safetensors")
    assert sorted(asked) == sorted(name for name in names if name.startswith("model.layers.1."))
