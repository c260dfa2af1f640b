"""What transformers makes nothing of, rows beyond the tokenizer, added tokens, an untied head."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lrquant import quantize
from lrquant.model.loading import load_model
from lrquant.preflight.checks import preflight
from lrquant.reports.inspection import inspect_folder
from lrquant.reports.preflight import preflight_text

EXTRA = {
    "mtp.layers.0.mlp.gate_proj.weight": torch.randn(48, 32),
    "mtp.layers.0.input_layernorm.weight": torch.randn(32),
    "mtp.fc.weight": torch.randn(32, 64),
}
FORMATS = {"lrquant": "W4A4", "dequantized": "W4A4", "compressed-tensors": "W4A16g16-sym"}


@pytest.fixture
def folder(model_folder):
    """A hybrid with layers for several tokens at once, which transformers does not make."""
    path = model_folder("qwen3_5")
    weights = load_file(path / "model.safetensors")
    save_file(weights | EXTRA, path / "model.safetensors", metadata={"format": "pt"})
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(["<added>"])
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("form", FORMATS)
def test_all_of_it_is_in_the_checkpoint(form, folder, token_ids, tmp_path):
    saved, settings = tmp_path / "saved", {"precision": "float32", "report": False}
    quantize(
        str(folder),
        FORMATS[form],
        calibration=token_ids(2, 12),
        output_dir=str(tmp_path / "run"),
        save_dir=str(saved),
        **{"format": form, "epochs": 0, **settings},
    )
    tensors = {}
    for path in saved.glob("*.safetensors"):
        tensors |= load_file(path)
    assert all(torch.equal(tensors[name], values) for name, values in EXTRA.items())
    source = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(tensors[name].float(), source[name]), name  # 264 rows for 260 tokens
    assert AutoTokenizer.from_pretrained(saved).convert_tokens_to_ids("<added>") == 259
    read = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    assert torch.isfinite(read(token_ids(1, 8)).logits).all()
    said = inspect_folder(saved)
    assert "carried unchanged" in said and "3 tensors of mtp.fc.weight, mtp.layers.0" in said


def test_the_pre_flight_names_it(folder):
    found = preflight({"scheme": "W4A16", "model": str(folder)}, load_model(str(folder)))
    assert "carried unchanged, as transformers makes nothing of them: mtp.fc.weight" in (
        preflight_text(found)
    )
