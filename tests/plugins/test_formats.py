"""A format and a term of the loss of another package."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from lrquant import quantize
from lrquant.errors import LRQuantError
from lrquant.export import reading_back


@pytest.fixture
def save(make_model, token_ids, tmp_path):
    def run(**settings):
        return quantize(
            make_model("llama-biases"),
            "W4A16g16",
            samples=token_ids(3, 16),
            output_dir=str(tmp_path / "run"),
            save_dir=str(tmp_path / "saved"),
            **{"format": "side-by-side", "epochs": 1, "precision": "float32", **settings},
        )

    return run


def test_a_format_of_another_package_is_written_and_read_back(installed, save, tmp_path):
    installed("add-an-export-format.md")
    run = save()
    written = load_file(tmp_path / "saved" / "model-0001.safetensors")
    frozen = run.workbench.view(1, run.workbench.stored(1))
    frozen.load(run.folder.load_block(1))
    for name, matrix in frozen.freeze().matrices.items():
        prefix = f"model.layers.1.{name}"
        assert torch.equal(written[f"{prefix}.codes"], matrix.codes)
        assert torch.equal(written[f"{prefix}.scale"], matrix.scale)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "side-by-side"
    assert "Not for vLLM: no runtime knows it" in (tmp_path / "saved" / "README.md").read_text()


def test_reading_back_sees_a_wrong_code(installed, save, tmp_path, monkeypatch):
    installed("add-an-export-format.md")
    compare = reading_back._compare_block

    def spoiled(name, decoded, *rest):
        decoded["mlp.down_proj.weight"][0, 0] += 1.0
        compare(name, decoded, *rest)

    monkeypatch.setattr(reading_back, "_compare_block", spoiled)
    with pytest.raises(LRQuantError, match="is not what was measured"):
        save()
    assert not (tmp_path / "saved").exists()


def test_a_format_refuses_what_it_does_not_hold(installed, save):
    installed("add-an-export-format.md")
    with pytest.raises(LRQuantError, match="rotation_sharing linear leaves a factor to run time"):
        save(lr_plus=True, rotation_sharing="linear")


def test_a_term_of_another_package_is_learned(installed, make_model, token_ids, tmp_path):
    installed("add-a-loss.md")
    run = quantize(
        make_model("llama"),
        "W3A16",
        samples=token_ids(3, 16),
        output_dir=str(tmp_path),
        **{"loss": "mse+largest", "epochs": 2, "precision": "float32", "dynamic_weights": True},
    )
    assert all(record.initial_loss == pytest.approx(2, rel=1e-2) for record in run.records)
    assert any(record.final_loss < record.initial_loss for record in run.records)


def test_a_term_that_nobody_declares_is_refused(make_model, token_ids, tmp_path):
    with pytest.raises(LRQuantError, match=r"loss 'mse\+odd': use one of mse, nlc"):
        quantize(
            make_model("llama"),
            "W3A16",
            samples=token_ids(1, 16),
            output_dir=str(tmp_path / "run"),
            loss="mse+odd",
        )
    assert not (tmp_path / "run").exists()
