"""compressed-tensors: transformers loads it without us, bit for bit what was learned."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lrquant import LRQuantError, export, quantize

SCHEMES = [
    *("W4A16", "W4A16g16", "W4A16-sym", "W4A16g16-sym", "W2A16g16", "W3A16", "W3A16-sym"),
    *("W5A16g16", "W6A16", "W7A16-sym", "W8A16", "W8A16-sym"),
]
WITH_ACTIVATIONS = [
    *("W8A8-sym-qkv16", "W4A8-sym-qkv16", "W4A4-sym-qkv16", "W4A8g16-sym-qkv16"),
    *("W4A4-sym-ag8-qkv16", "W4A8g16-sym-ag16-qkv16"),
]


@pytest.fixture
def learn(make_model, token_ids, tmp_path):
    def run(family, scheme, dtype=torch.bfloat16, **settings):
        return quantize(
            settings.pop("model", None) or make_model(family, dtype),
            scheme,
            calibration=token_ids(3, 16),
            output_dir=str(tmp_path / "run"),
            **{"precision": "float32", "overwrite": True, "lr_plus": True, "report": False},
            **{
                "epochs": 2,
                "lwc": True,
                "let": True,
                "save_dir": str(tmp_path / "saved"),
                **settings,
            },
        )

    return run


@pytest.fixture
def decompressed(tensors_of):
    """What the library makes of one linear."""

    def read(folder, module):
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
        prefix = module + "."
        state = {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors_of(folder).items()
            if name.startswith(prefix)
        }
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        return compressor.decompress(state, scheme)["weight"]

    return read


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("scheme", [*SCHEMES, *WITH_ACTIVATIONS])
def test_the_library_decodes_what_was_learned_bit_for_bit(
    learn, tmp_path, scheme, dtype, decompressed, learned_linears
):
    activations = {"activation_symmetric": True} if scheme in WITH_ACTIVATIONS else {}
    run = learn("llama", scheme, dtype, **activations)
    for index in range(2):
        for name, linear in learned_linears(run, index).items():
            found = decompressed(tmp_path / "saved", f"model.layers.{index}.{name}")
            assert found.dtype == dtype and torch.equal(found, linear.dequantize(dtype)), name


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("symmetric", ["", "-sym"])
def test_odd_shapes(learn, make_model, tmp_path, bits, symmetric, decompressed, learned_linears):
    """44 columns and 20 rows fill no whole number of words."""
    changes = {"hidden_size": 44, "intermediate_size": 20, "head_dim": 12}
    run = learn("llama", f"W{bits}A16{symmetric}", model=make_model("llama", **changes))
    for name, linear in learned_linears(run, 1).items():
        found = decompressed(tmp_path / "saved", f"model.layers.1.{name}")
        assert torch.equal(found, linear.dequantize(torch.float32)), name


def test_one_changed_code_is_seen(learn, tmp_path, decompressed, learned_linears):
    """Negative control of the comparison."""
    run = learn("llama", "W4A16g16")
    path = tmp_path / "saved" / "model-0000.safetensors"
    tensors, name = load_file(path), "model.layers.0.mlp.up_proj"
    tensors[f"{name}.weight_packed"][3, 1] ^= 1
    save_file(tensors, path, metadata={"format": "pt"})
    expected = learned_linears(run, 0)["mlp.up_proj"].dequantize(torch.bfloat16)
    assert (decompressed(tmp_path / "saved", name) != expected).sum() == 1


ALONE = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
assert not any(name.split(".")[0] == "lrquant" for name in sys.modules)
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])
"""


def test_transformers_alone_computes_what_was_learned(learn, make_model, token_ids, tmp_path):
    """In a process of its own that never imports this package."""
    run = learn("llama-biases", "W4A16g16", torch.float32)
    torch.save(token_ids(2, 20), tmp_path / "ids.pt")
    arguments = [tmp_path / "saved", tmp_path / "ids.pt", tmp_path / "logits.pt"]
    subprocess.run([sys.executable, "-c", ALONE, *map(str, arguments)], check=True)
    with torch.no_grad():
        learned = run.load_model()(token_ids(2, 20)).logits
        plain = make_model("llama-biases")(token_ids(2, 20)).logits
    found = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(found, learned, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain, learned, rtol=1e-2, atol=1e-2), "nothing was quantised"


@pytest.mark.parametrize("family", ["llama-tied", "qwen3", "opt", "opt-post-norm", "mistral"])
@pytest.mark.parametrize("scheme", ["W4A16", "W8A16-sym"])
def test_every_family_loads(learn, token_ids, tmp_path, family, scheme):
    run = learn(family, scheme, torch.float32, let=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    with torch.no_grad():
        found = model(token_ids(2, 20)).logits
        expected = run.load_model()(token_ids(2, 20)).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == model.config.tie_word_embeddings
    assert model.generate(token_ids(1, 4), max_new_tokens=3, do_sample=False).shape == (1, 7)


@pytest.mark.parametrize("scheme", WITH_ACTIVATIONS)
def test_activations_are_quantised_where_it_is_loaded(learn, token_ids, tmp_path, scheme):
    run = learn("llama", scheme, torch.float32, activation_symmetric=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    with torch.no_grad():
        found = model(token_ids(2, 20)).logits
        expected = run.load_model()(token_ids(2, 20)).logits
    # a borderline activation may take the neighbouring code: the scale's last bit differs
    error = (found - expected).abs().mean() / expected.abs().mean()
    assert error < 0.03, float(error)


HELD = {  # what of a block's linears is in memory: after loading, and after the first forward
    "W4A16g16": ({"weight"}, {"weight"}),
    "W3A16": ({"weight"}, {"weight"}),
    "W4A16g16-sym": ({"weight_packed", "weight_scale", "weight_shape"}, {"weight"}),
    "W8A8-sym-qkv16": ({"weight", "weight_scale"}, {"weight"}),
    "W4A8-sym-qkv16": ({"weight_packed", "weight_scale", "weight_shape"}, {"weight"}),
}


@pytest.mark.parametrize("scheme", HELD)
@pytest.mark.parametrize("forward", [False, True], ids=["loaded", "used"])
def test_what_transformers_holds_and_saves_again(learn, token_ids, tmp_path, scheme, forward):
    """As `check` says: zero points are decoded while loading, all else at the first forward."""
    activations = {"activation_symmetric": True} if scheme in WITH_ACTIVATIONS else {}
    learn("llama", scheme, torch.float32, **activations)
    model, other = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
        for _ in range(2)
    )
    ids = token_ids(2, 20)
    with torch.no_grad():
        expected = other(ids).logits
        if forward:
            model(ids)
    up = dict(model.model.layers[0].mlp.up_proj.named_parameters())
    packed, dense = HELD[scheme]
    assert up.keys() >= (dense if forward else packed)
    kept = "weight_packed" in up or up["weight"].dtype == torch.int8
    assert kept == (not forward and packed != {"weight"})
    model.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert ("quantization_config" in saved) == (packed != {"weight"}), "a dense model says nothing"
    tensors = load_file(tmp_path / "again" / "model.safetensors")
    assert (UP not in tensors or tensors[UP].dtype == torch.int8) == kept
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, expected, rtol=1e-4, atol=1e-4)


UP = "model.layers.0.mlp.up_proj.weight"


def test_zero_points_do_not_stay_packed(learn, tmp_path):
    """Why `dequantize` is there; when this fails, a library has learned to load them packed."""
    learn("llama", "W4A16g16")
    path = tmp_path / "saved" / "config.json"
    config = json.loads(path.read_text())
    assert config["quantization_config"].pop("dequantize") is True
    path.write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


def test_what_config_json_says(learn, tmp_path):
    learn("opt-post-norm", "W3A16g16", let=False)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    group = config["config_groups"]["group_0"]
    assert config["format"] == group["format"] == "pack-quantized"
    assert config["quant_method"] == "compressed-tensors"
    assert config["quantization_status"] == "compressed"
    outside = {"lm_head", "model.decoder.project_in", "model.decoder.project_out"}
    assert set(config["ignore"]) == outside
    assert group["weights"]["num_bits"] == 3 and group["weights"]["group_size"] == 16
    assert "input_activations" not in group, "no key that says nothing"


def test_it_is_really_small(learn, make_model, tmp_path, tensors_of):
    """The blocks' bits a weight, all overheads counted, against what the scheme says."""
    size = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    learn("llama", "W4A16g64", model=make_model("llama", torch.bfloat16, **size), epochs=1)
    weights = 2 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 256)
    packed = sum(
        tensor.nbytes
        for name, tensor in tensors_of(tmp_path / "saved").items()
        if "weight_" in name and not name.endswith("weight_shape")
    )
    assert 8 * packed / weights == pytest.approx(4 + (16 + 4) / 64, rel=0.02)


@pytest.mark.parametrize(
    ("scheme", "settings", "said"),
    [
        ("W4A4", {}, "--scheme W4A4-sym-qkv16 --activation_symmetric"),
        ("W6A6", {}, "--scheme W8A8-sym-qkv16 --activation_symmetric"),
        ("W8A8-sym", {"activation_symmetric": True}, "--scheme W8A8-sym-qkv16"),
        ("W4A4-ag16", {}, "--scheme W4A4-sym-ag16-qkv16 --activation_symmetric"),
        ("W8A8-ag16", {}, "--scheme W8A8-sym-qkv16 --activation_symmetric"),
        ("W16A8", {"lwc": False}, "not packed; --format dequantized or lrquant takes it"),
        ("W4A16", {"rotate_rank": 2}, "learn with --rotation_sharing site"),
        ("W4A16", {"rotation_sharing": "linear"}, "learn with --rotation_sharing site"),
        ("W8A8-sym-qkv16", {"activation_symmetric": True, "lac": True}, "--lac leaves a clipping"),
        ("W4A16", {"format": "gguf"}, "use one of awq, compressed-tensors, dequantized, lrquant"),
    ],
)
def test_what_it_cannot_hold_is_refused_before_learning(learn, tmp_path, scheme, settings, said):
    with pytest.raises(LRQuantError) as error:
        learn("llama", scheme, **settings)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_another_format_of_a_finished_run(
    model_folder, data_file, tmp_path, tensors_of, decompressed, learned_linears
):
    run = quantize(
        model_folder("llama"),
        "W4A16",
        output_dir=str(tmp_path / "run"),
        **{"calib_dataset": str(data_file), "nsamples": 2, "seqlen": 16, "epochs": 1},
        report=False,
    )
    export(str(tmp_path / "run"), str(tmp_path / "packed"))
    export(str(tmp_path / "run"), str(tmp_path / "dense"), format="dequantized")
    export(str(tmp_path / "run"), str(tmp_path / "again"))
    dense = tensors_of(tmp_path / "dense")
    for name in learned_linears(run, 1):
        full = f"model.layers.1.{name}"
        assert torch.equal(decompressed(tmp_path / "packed", full), dense[f"{full}.weight"])
    for path in (tmp_path / "packed").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes() or (
            path.name in ("lrquant.yaml", "lrquant.sha256")  # where it was written
        )


@pytest.fixture
def data_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("some words, and some more of them. " * 20)
    return path
