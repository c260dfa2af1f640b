"""AWQ: unpacked as the format defines it, it is what was learned; other software reads it too."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AwqConfig

from lrquant import LRQuantError, quantize

COLUMN = [0, 2, 4, 6, 1, 3, 5, 7]  # of eight, held by bits 0 to 3, 4 to 7, …
SIZES = {"llama": {"intermediate_size": 64}, "opt": {"ffn_dim": 64}}
HALF = [torch.bfloat16, torch.float16]


@pytest.fixture
def learn(make_model, token_ids, tmp_path):
    def run(family="llama", scheme="W4A16g32", dtype=torch.bfloat16, **settings):
        model = settings.pop("model", None)
        sizes = SIZES[family.partition("-")[0]]
        return quantize(
            make_model(family, dtype, **sizes) if model is None else model,
            scheme,
            calibration=token_ids(3, 16),
            output_dir=str(tmp_path / "run"),
            save_dir=str(tmp_path / "saved"),
            **{"precision": "float32", "overwrite": True, "lr_plus": True, "format": "awq"},
            **{"epochs": 2, "lwc": True, "let": True, "let_init": 1.0, "report": False, **settings},
        )

    return run


def unpacked(words):
    """Codes (rows, out) of int32 (rows, out / 8), bit by bit."""
    rows, count = words.shape
    codes = torch.empty(rows, 8 * count, dtype=torch.int64)
    for place, column in enumerate(COLUMN):
        codes[:, column::8] = (words.long() >> (4 * place)) & 15
    return codes


def weight_of(tensors, module):
    """The weight (out, in), float32, that the tensors of one linear stand for."""
    codes, zeros = (unpacked(tensors[f"{module}.{part}"]) for part in ("qweight", "qzeros"))
    scales = tensors[f"{module}.scales"]
    assert scales.dtype == torch.float16 and scales.shape == zeros.shape
    size = len(codes) // len(zeros)
    steps = codes - zeros.repeat_interleave(size, 0)
    return (scales.float().repeat_interleave(size, 0) * steps).T


@pytest.fixture
def dense_model(make_model, tensors_of, tmp_path):
    """A float32 transformers model with what the checkpoint stands for."""

    def make(family):
        tensors = tensors_of(tmp_path / "saved")
        modules = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
        parts = ("qweight", "qzeros", "scales")
        dense = {n: t.float() for n, t in tensors.items() if n.split(".")[-1] not in parts}
        dense |= {f"{module}.weight": weight_of(tensors, module) for module in modules}
        model = make_model(family, **SIZES[family.partition("-")[0]])
        missing, unexpected = model.load_state_dict(dense, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}
        return model

    return make


@pytest.mark.parametrize("dtype", HALF, ids=["bf16", "f16"])
@pytest.mark.parametrize("scheme", ["W4A16", "W4A16g32", "W4A16-sym", "W4A16g32-sym"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_half_precision_models_keep_every_bit(
    learn, tmp_path, family, scheme, dtype, tensors_of, learned_linears
):
    run = learn(family, scheme, dtype)
    tensors = tensors_of(tmp_path / "saved")
    for index in range(2):
        for name, linear in learned_linears(run, index).items():
            module = f"{run.workbench.model.block_name(index)}.{name}"
            assert torch.equal(weight_of(tensors, module), linear.dequantize(torch.float32)), name
            assert (f"{module}.bias" in tensors) == (linear.bias is not None)
    kinds = {tensor.dtype for tensor in tensors.values()}
    assert kinds == {torch.int32, torch.float16, dtype}


def test_scales_of_a_float32_model_are_rounded_to_float16(
    learn, tmp_path, tensors_of, learned_linears
):
    run = learn(dtype=torch.float32)
    tensors, changed = tensors_of(tmp_path / "saved"), 0
    for name, linear in learned_linears(run, 0).items():
        module = f"model.layers.0.{name}"
        assert torch.equal(unpacked(tensors[f"{module}.qweight"]).T, linear.codes.long())
        assert torch.equal(unpacked(tensors[f"{module}.qzeros"]).T, linear.zero_point.long())
        found, expected = weight_of(tensors, module), linear.dequantize(torch.float32)
        torch.testing.assert_close(found, expected, rtol=2**-11, atol=0)
        changed += int((found != expected).sum())
    assert changed, "a float32 scale has more bits than it keeps"
    assert {tensor.dtype for tensor in tensors.values()} == {torch.int32, torch.float16}
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "float16"


def test_from_which_scale_on_bfloat16_is_exact():
    """The limit that the format's first lines name."""
    exponents = torch.arange(-17, 15)
    scales = (1 + torch.arange(128) / 128)[:, None] * 2.0**exponents
    assert torch.equal(scales.to(torch.bfloat16).float(), scales)
    assert torch.equal(scales.to(torch.float16).float(), scales)
    smaller = scales[:, :1] / 2
    assert not torch.equal(smaller.to(torch.float16).float(), smaller)


def test_one_changed_code_is_seen(learn, tmp_path, learned_linears):
    """Negative control of the comparison."""
    run = learn()
    path, module = tmp_path / "saved" / "model-0000.safetensors", "model.layers.0.mlp.up_proj"
    tensors = load_file(path)
    expected = learned_linears(run, 0)["mlp.up_proj"].dequantize(torch.float32)
    tensors[f"{module}.qweight"][3, 1] ^= 1 << 4
    ((row, column),) = (weight_of(tensors, module) != expected).nonzero().tolist()
    assert (row, column) == (8 + 2, 3), "the second place of a word is the third column of eight"


@pytest.mark.parametrize("family", ["llama", "llama-tied", "llama-biases", "opt"])
def test_the_whole_model_computes_what_was_learned(
    learn, make_model, dense_model, token_ids, family
):
    """transformers' own model with the unpacked weights, nothing else from this package."""
    run = learn(family, "W4A16g32", torch.float32)
    ids = token_ids(2, 20)
    with torch.no_grad():
        learned = run.load_model()(ids).logits
        plain = make_model(family, **SIZES[family.partition("-")[0]])(ids).logits
        found = dense_model(family)(ids).logits
    torch.testing.assert_close(found, learned, rtol=1e-2, atol=1e-2)
    assert (plain - learned).abs().mean() > 10 * (found - learned).abs().mean()


def test_what_config_json_says(learn, tmp_path):
    learn(scheme="W4A16g32")
    grouped = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert grouped["dtype"] == "bfloat16"
    assert grouped["quantization_config"] == {
        **{"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True},
        **{"version": "gemm", "modules_to_not_convert": ["lm_head"]},
    }
    known = AwqConfig.from_dict(grouped["quantization_config"])
    assert (known.bits, known.group_size, known.format) == (4, 32, "gemm")
    learn("opt-post-norm", "W4A16")
    rows = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert rows["group_size"] == -1
    outside = {"lm_head", "model.decoder.project_in", "model.decoder.project_out"}
    assert set(rows["modules_to_not_convert"]) == outside


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16g32"])
def test_gptqmodel_reads_what_was_learned(learn, tmp_path, scheme, tensors_of, learned_linears):
    packing = pytest.importorskip("gptqmodel.quantization.awq.utils.packing_utils")
    run = learn(scheme=scheme)
    tensors = tensors_of(tmp_path / "saved")
    for name, linear in learned_linears(run, 1).items():
        words, zeros, scales = (
            tensors[f"model.layers.1.{name}.{part}"] for part in ("qweight", "qzeros", "scales")
        )
        found = packing.dequantize_gemm(words, zeros, scales.float(), 4, linear.group_size)
        assert torch.equal(found.T, linear.dequantize(torch.float32)), name


def test_transformers_loads_it(learn, dense_model, token_ids, tmp_path):
    pytest.importorskip("gptqmodel")
    learn("llama-tied", "W4A16g32", torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert "Awq" in type(model.model.layers[0].mlp.up_proj).__name__
    with torch.no_grad():
        found = model(token_ids(2, 20)).logits
        expected = dense_model("llama-tied")(token_ids(2, 20)).logits
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)  # its linears are float16
    assert model.generate(token_ids(1, 4), max_new_tokens=3, do_sample=False).shape == (1, 7)


@pytest.mark.parametrize(
    ("scheme", "settings", "said"),
    [
        ("W4A4", {}, "the nearest that it holds is --scheme W4A16,"),
        ("W3A16g16", {}, "--scheme W4A16g32,"),
        ("W8A16g64-sym", {}, "--scheme W4A16g64-sym,"),
        ("W4A16g256", {}, "--scheme W4A16g128,"),
        ("W4A16-qkv4", {}, "--scheme W4A16,"),
        ("W16A8", {"lwc": False}, "--scheme W4A16,"),
        ("W4A16", {"rotate_rank": 2}, "learn with --rotation_sharing site"),
        ("W4A16", {"rotation_sharing": "linear"}, "learn with --rotation_sharing site"),
    ],
)
def test_what_it_cannot_hold_is_refused_before_learning(
    learn, make_model, tmp_path, scheme, settings, said
):
    wide = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 1}
    with pytest.raises(LRQuantError) as error:
        learn(scheme=scheme, model=make_model("llama", **wide), **settings)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_rows_that_fill_no_word_are_refused_before_learning(learn, make_model, tmp_path):
    with pytest.raises(LRQuantError) as error:
        learn(scheme="W4A16", model=make_model("llama", intermediate_size=44))
    assert str(error.value) == (
        "--format awq: mlp.gate_proj: 44 output rows do not fill words of 8; use --format "
        "dequantized"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"])
def test_what_float16_cannot_hold_is_refused(learn, make_model, tmp_path, name):
    """A value that a float32 model has and the checkpoint's dtype has not."""
    model = make_model("llama", **SIZES["llama"])
    model.get_parameter(name).data[5, 7] = 3e6
    with pytest.raises(LRQuantError, match=r"too large for (float16|the checkpoint)") as error:
        learn(model=model, epochs=0, lwc=False, let=False)
    assert name.rpartition(".")[0] in str(error.value) and "\n" not in str(error.value)
    learned = [] if "embed" in name else ["run"]  # outside the blocks it is seen before
    assert [path.name for path in tmp_path.iterdir()] == learned
