"""A checkpoint is read back before it is put in place: what is written is what was measured."""

from __future__ import annotations

import dataclasses
import json

import pytest

from lrquant import LRQuantError, quantize
from lrquant.formats import checkpoint
from lrquant.formats.checkpoint import save_checkpoint
from lrquant.formats.choice import formats

CASES = {
    "bytes": ("qwen3", "W8A8-sym-qkv16", {"activation_symmetric": True}),
    "native": ("opt", "W4A4g16", {"format": "lrquant"}),
    "floating": ("mistral", "W16A8", {"format": "dequantized"}),
}


@pytest.fixture
def learned(make_model, token_ids, tmp_path):
    def run(family, scheme, **settings):
        return quantize(
            make_model(family),
            scheme,
            calibration=token_ids(3, 16),
            output_dir=str(tmp_path / "run"),
            **{"precision": "float32", "epochs": 0, "report": False, **settings},
        )

    return run


def export(run, place, change=lambda tensors: tensors):
    """Write a run with every block's tensors changed on their way to the disk."""
    form = formats()[run.config.format or "compressed-tensors"]

    def tensors(frozen, dtype):
        return change(form.tensors(frozen, dtype))

    changed = dataclasses.replace(form, tensors=tensors)
    save_checkpoint(run.workbench, run.config.origin, run.folder, place, changed)


def refused(run, place, words, change=lambda tensors: tensors):
    with pytest.raises(LRQuantError, match=words) as error:
        export(run, place, change)
    assert "\n" not in str(error.value) and "nothing is put in place" in str(error.value)
    assert not place.exists()


def flipped(tensors):
    """One bit of one weight, or one code, is another."""
    name = next(n for n in tensors if n.endswith(("weight_packed", "qweight", "proj.weight")))
    tensor = tensors[name].clone()
    if tensor.is_floating_point():
        tensor[0, 0] += 0.1
    else:
        tensor[0, 0] ^= 1
    return {**tensors, name: tensor}


@pytest.mark.parametrize("case", CASES)
def test_one_code_that_differs_is_found(learned, tmp_path, case):
    family, scheme, settings = CASES[case]
    run = learned(family, scheme, **settings)
    export(run, tmp_path / "right")
    refused(run, tmp_path / "wrong", r"read back, model\S+weight is up to", flipped)


def test_a_norm_that_was_not_folded_is_found(learned, tmp_path):
    run = learned("llama", "W4A16g16")

    def change(tensors):
        norm = tensors["input_layernorm.weight"]
        return {**tensors, "input_layernorm.weight": norm * 1.01}

    refused(run, tmp_path / "wrong", "input_layernorm.weight is up to", change)


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("llama", {"rope_theta": 77.0, "rope_parameters": None}, "config.json makes of"),
        ("llama", {"rms_norm_eps": 0.5}, "config.json makes of"),
        ("llama-tied", {"tie_word_embeddings": False}, "tensors are missing"),
        ("llama", {"tie_word_embeddings": True}, None),
        ("gemma3", {"layer_types": ["full_attention"] * 2}, "config.json makes of"),
        ("llama", {"num_key_value_heads": 4}, "by config.json"),
        ("gemma3", {"hidden_size_per_head": 3}, None),
    ],
)
def test_a_configuration_that_computes_something_else_is_found(
    learned, tmp_path, monkeypatch, family, changes, words
):
    run = learned(family, "W4A16", format="dequantized")
    write = checkpoint.write_small_files

    def other(model, config, place, form, parts):
        write(model, config, place, form, parts)
        values = json.loads((place / "config.json").read_text()) | changes
        kept = {key: value for key, value in values.items() if value is not None}
        (place / "config.json").write_text(json.dumps(kept))

    monkeypatch.setattr(checkpoint, "write_small_files", other)
    if words is None:
        export(run, tmp_path / "right")
        return
    with pytest.raises(LRQuantError, match=words):
        export(run, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_a_quantization_config_of_other_bits_is_found(learned, tmp_path):
    run = learned("llama", "W4A16g16")
    form = formats()["compressed-tensors"]

    def other(parts, outside):
        values = form.quantization_config(parts, outside)
        values["config_groups"]["group_0"]["weights"]["num_bits"] = 8
        return values

    wrong = dataclasses.replace(form, quantization_config=other)
    with pytest.raises(LRQuantError, match="read back"):
        save_checkpoint(run.workbench, run.config.origin, run.folder, tmp_path / "wrong", wrong)
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize(
    "outer", ["lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_a_tensor_outside_the_blocks_that_differs_is_found(learned, tmp_path, monkeypatch, outer):
    run = learned("llama", "W4A16g16")
    save = checkpoint.save_file

    def other(tensors, path, metadata):
        if outer in tensors:
            tensors = {**tensors, outer: tensors[outer].roll(1)}
        save(tensors, path, metadata)

    monkeypatch.setattr(checkpoint, "save_file", other)
    refused(run, tmp_path / "wrong", f"{outer} is up to")


def test_rounding_to_the_checkpoints_dtype_is_no_difference(learned, tmp_path):
    for dtype in ("float16", "bfloat16"):
        run = learned("qwen2", "W4A16g16", save_dtype=dtype, overwrite=True)
        export(run, tmp_path / dtype)
        assert (tmp_path / dtype / "config.json").is_file()
