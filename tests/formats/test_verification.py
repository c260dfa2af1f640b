"""Verification of a checkpoint: what it says of itself, and what is named where it is not so."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lrquant import quantize
from lrquant.cli import main
from lrquant.files.manifest import MANIFEST, write_manifest
from lrquant.formats.checkpoint import INDEX
from lrquant.formats.verification import verify
from lrquant.reports.inspection import inspect_folder

SHARD = "model-0001.safetensors"


def rehashed(folder):
    """As if the changed files had been written so: what is found then is not their hash."""
    facts = json.loads((folder / MANIFEST).read_text())
    for key in ("version", "lrquant", "files"):
        del facts[key]
    (folder / MANIFEST).unlink()
    write_manifest(folder, facts)


def edit(folder, change, shard=SHARD):
    tensors = load_file(folder / shard)
    change(tensors)
    save_file(tensors, folder / shard, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("family", "scheme", "settings", "bits"),
    [
        ("opt-post-norm", "W4A16", {"format": "awq"}, None),
        ("qwen3", "W4A4", {"format": "lrquant"}, None),
        ("qwen2", "W4A16", {"format": "dequantized"}, 32.0),
        ("llama", "W4A16", {"format": "dequantized", "save_dtype": "bfloat16"}, 16.0),
        (
            *("opt-no-biases", "W4A6"),
            {"format": "lrquant", "epochs": 1, "lr_plus": True, "rotation_sharing": "linear"}
            | {"let": True, "let_shift": "always"},
            None,
        ),
    ],
    ids=str,
)
def test_what_was_written_is_whole(saved, family, scheme, settings, bits):
    folder = saved(family, scheme, **settings)
    found = verify(folder)
    assert found.problems == []
    assert found.stored == sum(
        tensor.nbytes
        for path in folder.glob("*.safetensors")
        for tensor in load_file(path).values()
    )
    assert bits is None or found.bits_per_weight == bits
    assert "verified: hashes of" in inspect_folder(folder)


def test_bits_per_weight_count_scales_zero_points_and_shapes(saved):
    """By hand: 4-bit codes, float32 scale and 4-bit zero point a row, two int64 a linear."""
    found = verify(saved("llama", "W4A16"))
    shapes = [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]
    bits = sum(4 * rows * columns + (32 + 4) * rows + 128 for rows, columns in shapes)
    assert found.bits_per_weight == pytest.approx(bits / sum(r * c for r, c in shapes))


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_a_tied_head_is_counted_once(saved, make_model, family):
    parameters = sum(p.numel() for p in make_model(family).parameters())
    assert verify(saved(family, "W4A16")).as_bf16 == 2 * parameters


Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(f"{Q}.weight_scale"), "lacks"),
        (lambda t: t.update({f"{Q}.weight_scale": torch.ones(32, 2)}), "shape (32, 2), expected"),
        (lambda t: t.update({f"{Q}.weight_scale": torch.ones(32, 1).half()}), "float16, expected"),
        (lambda t: t[f"{Q}.weight_scale"].neg_(), "scales that are not positive"),
        (lambda t: t[f"{Q}.weight_scale"].fill_(float("nan")), "not finite"),
        (lambda t: t.update(surprise=torch.ones(2)), "surprise: not part of the model"),
        (lambda t: t["model.layers.1.mlp.down_proj.weight_packed"][3].fill_(-1), "last column"),
    ],
)
def test_what_is_wrong_is_named(saved, capsys, change, said):
    folder = saved("llama", "W3A16")  # 48 columns of 3 bits leave half a word unused
    edit(folder, change)
    assert main(["inspect", str(folder)]) == 2, "the hash differs already"
    capsys.readouterr()
    rehashed(folder)
    assert main(["inspect", str(folder)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1, error


def test_one_changed_bit_is_seen(saved):
    folder = saved("llama", "W4A16")
    edit(folder, lambda t: t[f"{Q}.weight_packed"].bitwise_xor_(1))
    assert verify(folder).problems == [f"{SHARD}: changed since it was written (SHA-256 differs)"]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda d: (d / SHARD).unlink(), "1 of 3 weight shards are missing"),
        (lambda d: (d / SHARD).write_bytes((d / SHARD).read_bytes()[:-9]), "cut short or damaged"),
        (lambda d: (d / SHARD).write_bytes((d / SHARD).read_bytes()[:5]), "cut short or damaged"),
        (lambda d: (d / INDEX).write_text("{"), "cut short or damaged"),
        (lambda d: (d / "config.json").write_text("{}"), "config.json"),
        (lambda d: (d / MANIFEST).write_text("[]"), "not a JSON object"),
        (lambda d: (d / MANIFEST).write_text("{}"), "not a manifest"),
        (
            lambda d: (d / MANIFEST).write_text('{"version": 2, "files": {}}'),
            "version 2: this lrquant reads up to 1; update lrquant",
        ),
    ],
)
def test_damaged_folders_are_one_line(saved, capsys, damage, said):
    folder = saved("llama", "W4A16")
    damage(folder)
    assert main(["inspect", str(folder)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1, error


def test_a_checkpoint_of_others_is_shown_and_not_verified(model_folder):
    assert "not verified" in inspect_folder(model_folder("llama"))


def test_the_manifest_and_the_card_say_where_it_comes_from(model_folder, tmp_path):
    (tmp_path / "text.txt").write_text("some words, and some more of them. " * 40)
    text = str(tmp_path / "text.txt")
    run = quantize(
        model_folder("llama"),
        "W4A16",
        **{"calib_dataset": text, "nsamples": 2, "seqlen": 16, "epochs": 1, "ppl": (text,)},
        **{"output_dir": tmp_path / "run", "save_dir": tmp_path / "saved", "compare": True},
        report=False,
    )
    facts = json.loads((tmp_path / "saved" / MANIFEST).read_text())
    config = (tmp_path / "saved" / "config.json").read_bytes()
    assert facts["files"]["config.json"]["sha256"] == hashlib.sha256(config).hexdigest()
    assert facts["calibration"]["sha256"] == run.folder.identity["data"]["sha256"]
    card = (tmp_path / "saved" / "README.md").read_text()
    assert facts["calibration"]["sha256"] in card and "Scheme: W4A16" in card
    assert f"{run.results['perplexity'][text]['quantized']:.2f}" in card
    assert f"{run.results['perplexity'][text]['full_precision']:.2f}" in card
    assert "vllm serve" in card and "base_model" not in card.split("---")[1]  # not of the hub
    assert str(tmp_path) not in card


def test_a_run_that_is_not_finished_is_refused(saved, tmp_path, capsys):
    saved("llama", "W4A16", epochs=1)
    (tmp_path / "run" / "blocks" / "0001.safetensors").unlink()
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "other")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and not (tmp_path / "other").exists(), error
