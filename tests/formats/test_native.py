"""The native format: all that is learned, loaded by transformers and computed with integers."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM

from lrquant import LRQuantError, quantize
from lrquant.blocks.workbench import learned_view
from lrquant.formats.checkpoint import INDEX
from lrquant.numerics.grids.schemes import activation_grid
from lrquant.numerics.tokens import fake_quantize_tokens
from lrquant.runtime.linear import IntegerLinear

RUNS = [
    ("llama", "W4A4", {}),
    ("llama-biases", "W6A6", {}),
    ("llama-tied", "W4A4g16", {"symmetric": True}),
    ("llama", "W4A4", {"let_shift": "always"}),
    ("llama", "W3A6", {"rotation_sharing": "linear", "let_shift": "always"}),
    ("llama-no-gqa", "W4A8-qkv4", {}),
    ("mistral-sliding", "W8A8", {"let_sites": ("norm", "value_output", "query_key", "up_down")}),
    ("qwen2", "W4A4", {"qkv_bits": 16}),
    ("qwen3", "W5A4g16", {}),
    ("opt", "W4A4", {"let_shift": "always"}),
    ("opt-post-norm", "W4A6", {"let_sites": ("value_output",)}),
    ("opt-no-biases", "W4A4", {"let_shift": "always"}),
    ("llama", "W4A4", {"lac": True}),
    ("qwen2", "W4A4g16-ag16", {"lac": True, "lac_lr": 0.05}),
    ("llama", "W3A16g16", {}),
    ("llama", "W4A4-hadamard", {}),
    ("qwen3", "W4A4-r3", {"scheme_for": ("layers.1=W4A8-qkv4",)}),
    ("qwen3_moe", "W4A4", {"scheme_for": ("down_proj=W4A4-hadamard",)}),
    ("phi3", "W4A8g16", {"scheme_for": ("self_attn.qkv_proj=W4A8g16-hadamard",), "lac": True}),
    ("llama", "W4A16", {"rotation_sharing": "linear"}),
    ("llama", "W16A8", {"lwc": False, "lr_plus": False}),
]
SPREAD = [
    ("llama-biases", "W4A4", {"let_shift": "always"}),
    ("llama-tied", "W4A4g16-ag8", {"symmetric": True}),
    ("opt", "W3A16g16", {}),
    ("llama", "W16A8", {"lwc": False, "lr_plus": False}),
]


@pytest.fixture
def learn(make_model, token_ids, tmp_path):
    def run(family, scheme, dtype=torch.float32, **settings):
        given = {"precision": "float32", "overwrite": True, "lr_plus": True, "epochs": 2}
        given |= {"lwc": True, "let": True, "format": "lrquant", "report": False, **settings}
        return quantize(
            make_model(family, dtype),
            scheme,
            calibration=token_ids(3, 16),
            output_dir=str(tmp_path / "run"),
            save_dir=str(tmp_path / "saved"),
            **given,
        )

    return run


def loaded(folder, **settings):
    return AutoModelForCausalLM.from_pretrained(folder, **settings)


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


@pytest.mark.parametrize(("family", "scheme", "settings"), RUNS, ids=str)
def test_it_computes_what_was_learned(
    learn, make_model, token_ids, tmp_path, assert_alike, family, scheme, settings
):
    """Logits of the integers against those of the fake-quantised model, and saved once more."""
    run, ids = learn(family, scheme, **settings), token_ids(2, 20)
    model = loaded(tmp_path / "saved")
    learned, plain = logits(run.load_model(), ids), logits(make_model(family), ids)
    assert_alike(logits(model, ids), learned)
    assert (plain - learned).abs().mean() > 5e-3, "nothing was quantised"
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(loaded(tmp_path / "again"), ids), logits(model, ids))
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    assert model.generate(ids[:1, :4], **settings).shape == (1, 7)


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize(("family", "scheme", "settings"), SPREAD, ids=str)
def test_blocks_on_the_disk_come_packed_to_each_forward(
    learn, token_ids, tmp_path, family, scheme, settings
):
    """By transformers' own device map, which knows how large a block is once it is unpacked."""
    pytest.importorskip("accelerate", reason="needs the extra lrquant[eval]")
    learn(family, scheme, epochs=1, **settings)
    folder, ids = tmp_path / "saved", token_ids(2, 20)
    model = loaded(folder)
    whole = sum(each.nbytes for each in [*model.parameters(), *model.buffers()])
    places = {"device_map": "auto", "offload_folder": tmp_path / "away"}
    spread = loaded(folder, max_memory={"cpu": whole * 3 // 4}, **places)
    assert any(each.is_meta for each in spread.parameters())
    assert torch.equal(logits(spread, ids), logits(model, ids))
    spread.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(loaded(tmp_path / "again"), ids), logits(model, ids))


def test_whoever_may_read_the_folder_may_read_its_tensors(learn, tmp_path):
    run = learn("llama", "W4A4")
    modes = {path.stat().st_mode for path in (tmp_path / "saved").iterdir()}
    assert modes == {(tmp_path / "saved" / "config.json").stat().st_mode}
    assert run.folder.block_path(0).stat().st_mode in modes


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    "scheme", ["W4A4", "W8A8", "W4A4g16", "W3A16", "W4A4-ag8", "W4A4g16-ag8", "W4A8g8-ag16"]
)
def test_each_linear_agrees_to_the_rounding_of_its_sums(learn, tmp_path, scheme, symmetric):
    """On the same inputs: of a symmetric grid the largest value lies between two codes."""
    settings = {"rotation_sharing": "linear", "activation_symmetric": symmetric}
    settings |= {"lac": not scheme.endswith("A16"), "lac_lr": 0.1}
    run = learn("llama-biases", scheme, **settings)
    model = loaded(tmp_path / "saved")
    frozen = learned_view(run.workbench, run.folder, 1).freeze()
    generator = torch.Generator().manual_seed(0)
    for name, expected in frozen.matrices.items():
        module = model.get_submodule(f"model.layers.1.{name}")
        assert isinstance(module, IntegerLinear)
        values = torch.randn(7, module.in_features, generator=generator)
        inputs = values * expected.input_factor
        grid, clip = activation_grid(run.config.quantization), expected.input_clip
        inputs = inputs if grid is None else fake_quantize_tokens(inputs, grid, clip=clip)
        weight = expected.dequantize(torch.float32)
        assert torch.equal(module.weight(torch.float32), weight)
        exact = linear(inputs.double(), weight.double(), expected.bias.double())
        error = (module(values).double() - exact).abs().max() / exact.abs().max()
        assert error < 1e-6, (name, float(error))


def test_the_linears_hold_integers_and_multiply_them(learn, token_ids, tmp_path, monkeypatch):
    learn("llama", "W4A4")
    model = loaded(tmp_path / "saved")
    calls = []
    from lrquant.numerics import products

    product = products.integer_product
    monkeypatch.setattr(
        products, "integer_product", lambda a, b: calls.append((a.dtype, b.dtype)) or product(a, b)
    )
    logits(model, token_ids(1, 6))
    assert calls == [(torch.int8, torch.int8)] * 14
    linears = [m for m in model.modules() if isinstance(m, IntegerLinear)]
    assert len(linears) == 14 and all(m.codes.dtype == torch.int8 for m in linears)


def test_one_changed_code_is_seen(learn, token_ids, tmp_path):
    """Negative control."""
    run, ids = learn("llama", "W4A4"), token_ids(2, 20)
    path = tmp_path / "saved" / "model-0001.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight_packed"][:, 0] ^= 1 << 3
    save_file(tensors, path, metadata={"format": "pt"})
    learned = logits(run.load_model(), ids)
    assert not torch.allclose(logits(loaded(tmp_path / "saved"), ids), learned, rtol=1e-2)


def test_bf16_checkpoints_keep_their_scales(learn, token_ids, tmp_path):
    run = learn("llama", "W4A4", torch.bfloat16)
    model = loaded(tmp_path / "saved", dtype=torch.float32)
    frozen = learned_view(run.workbench, run.folder, 0).freeze()
    for name, expected in frozen.matrices.items():
        weight = model.get_submodule(f"model.layers.0.{name}").weight(torch.float32)
        assert torch.equal(weight, expected.dequantize(torch.float32)), name
    assert logits(loaded(tmp_path / "saved"), token_ids(1, 5)).dtype == torch.bfloat16


def test_the_files_are_packed(learn, tmp_path):
    learn("llama", "W3A4")
    index = json.loads((tmp_path / "saved" / INDEX).read_text())["weight_map"]
    packed = [name for name in index if name.endswith(".weight_packed")]
    assert len(packed) == 14
    tensors = load_file(tmp_path / "saved" / "model-0000.safetensors")
    assert tensors["model.layers.0.mlp.up_proj.weight_packed"].shape == (48, 32 * 3 // 32)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format_version": 2}, "format version 2: this lrquant reads up to 1; update lrquant"),
        ({"surprise": True}, "unknown surprise"),
        ({"scheme": None}, "no scheme"),
    ],
)
def test_what_it_does_not_know_is_refused(learn, tmp_path, change, said):
    learn("llama", "W4A4", epochs=1)
    path = tmp_path / "saved" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(LRQuantError, match=said):
        loaded(tmp_path / "saved")


@pytest.mark.parametrize(
    "name", ["mlp.down_proj.weight_scale", "input_layernorm.weight", "input_layernorm.shift"]
)
def test_a_missing_tensor_is_refused(learn, tmp_path, name):
    """transformers would warn, and go on with whatever is in its memory."""
    learn("llama", "W4A4", epochs=1, let_shift="always")
    path, index = tmp_path / "saved" / "model-0001.safetensors", tmp_path / "saved" / INDEX
    tensors, values = load_file(path), json.loads(index.read_text())
    del tensors[f"model.layers.1.{name}"], values["weight_map"][f"model.layers.1.{name}"]
    save_file(tensors, path, metadata={"format": "pt"})
    index.write_text(json.dumps(values))
    with pytest.raises(LRQuantError, match=rf"model.layers.1.{name} is missing; export"):
        loaded(tmp_path / "saved")


def test_the_dense_factor_is_refused_before_learning(learn, tmp_path):
    with pytest.raises(
        LRQuantError, match="learn with --rotation_sharing site, or linear for --format lrquant"
    ):
        learn("llama", "W4A4", rotation_sharing="weight")
    assert list(tmp_path.iterdir()) == []
