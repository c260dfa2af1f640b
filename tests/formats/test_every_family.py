"""Every family learned, written and read by plain transformers, whose logits are those learned."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from lrquant import quantize
from lrquant.architectures import architecture_of
from lrquant.config.choices import KINDS

SETTINGS = {
    "W4A16g16": {"lr_plus": True, "let": True, "lwc": True, "format": "dequantized"},
    "W4A4": {"lwc": True, "let": True, "format": "lrquant"},
}


@pytest.mark.parametrize("scheme", SETTINGS)
def test_learned_written_and_read_back(
    scheme, first_variant, make_model, token_ids, assert_alike, tmp_path
):
    module, ids = make_model(first_variant), token_ids(2, 12)
    own_attention = architecture_of(module.config).own_attention
    run = quantize(
        module,
        f"{scheme}-qkv16" if own_attention else scheme,
        calibration=ids,
        output_dir=str(tmp_path / "run"),
        save_dir=str(tmp_path / "saved"),
        **{
            "let_sites": KINDS,
            "epochs": 1,
            "precision": "float32",
            "report": False,
            "expert_tokens": 0,
        },
        **SETTINGS[scheme],
    )
    assert all(record.final_loss <= record.initial_loss for record in run.records)
    learned = run.load_model()(ids).logits
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    if scheme == "W4A4":
        assert_alike(read(ids).logits, learned)
    else:
        torch.testing.assert_close(read(ids).logits, learned, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(module(ids).logits, learned, atol=1e-3), "nothing was quantised"
