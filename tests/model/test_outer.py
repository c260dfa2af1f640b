"""Values outside the blocks that are no numbers are named before anything is learned."""

from __future__ import annotations

import pytest
import torch

from lrquant import LRQuantError, quantize
from lrquant.model.loading import from_module, load_model
from lrquant.model.outer import require_finite
from lrquant.preflight.checks import preflight

OUTER = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")


@pytest.fixture
def damaged(make_model):
    def make(name, value, family="llama"):
        model = make_model(family)
        model.get_parameter(name).data.view(-1)[-1] = value
        return model

    return make


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", OUTER)
def test_a_value_that_is_no_number_is_named_before_learning(
    damaged, token_ids, tmp_path, name, value
):
    with pytest.raises(LRQuantError, match=f"{name} holds values that are not finite"):
        quantize(
            damaged(name, value), "W4A16", calibration=token_ids(2, 8), output_dir=tmp_path / "r"
        )
    assert not (tmp_path / "r").exists()


def test_the_check_names_it_too(damaged, tiny_tokenizer, tmp_path):
    damaged(OUTER[1], float("nan")).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    settings = {"model": str(tmp_path / "model"), "scheme": "W4A16", "seqlen": 8}
    found = preflight({**settings, "output_dir": str(tmp_path / "run")})
    assert any(OUTER[1] in finding.text for finding in found.failed)


def test_a_value_too_large_for_the_checkpoint_is_named_before_learning(
    damaged, token_ids, tmp_path
):
    settings = {"save_dir": str(tmp_path / "saved"), "output_dir": str(tmp_path / "run")}
    settings |= {"save_dtype": "float16", "calibration": token_ids(2, 8)}
    with pytest.raises(LRQuantError, match=r"lm_head\.weight holds values too large"):
        quantize(damaged("lm_head.weight", 1e6), "W4A16", **settings)
    assert not (tmp_path / "run").exists()


def test_a_sound_model_passes(variant, make_model):
    require_finite(from_module(make_model(variant)))


def test_a_tied_head_is_read_once(model_folder, monkeypatch):
    model = load_model(str(model_folder("llama-tied")))
    read: list[str] = []
    source = type(model.source)
    tensor = source.tensor
    monkeypatch.setattr(
        source, "tensor", lambda self, name: read.append(name) or tensor(self, name)
    )
    require_finite(model, torch.float16)
    assert "lm_head.weight" not in read and "model.embed_tokens.weight" in read
