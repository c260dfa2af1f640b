"""Kinds of model folders: whatever is no whole model in floating point is named in one line."""

from __future__ import annotations

import json

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from lrquant import LRQuantError, quantize
from lrquant.model.loading import from_module, load_model
from lrquant.model.sources import resolve_model
from lrquant.model.sources.files import SafetensorsSource
from lrquant.model.sources.gguf_file import quantised_types
from lrquant.model.sources.kinds import quantized_by
from lrquant.preflight.checks import preflight


def refusal(action, *arguments):
    with pytest.raises(LRQuantError) as caught:
        action(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("run.json", "a run folder; evaluate or export it"),
        ("params.json", "layout of its makers"),
        ("consolidated.00.pth", "layout of its makers"),
        ("consolidated.safetensors", "layout of its makers"),
        ("model_index.json", "diffusers"),
        ("model.onnx", "an ONNX model"),
        ("model.nemo", "a NeMo model"),
        ("__0_0.distcp", "a sharded training checkpoint"),
        ("global_step8/states.pt", "zero_to_fp32.py"),
        ("checkpoint-8/config.json", "give one of the folders in it"),
        ("snapshots/abc/config.json", "the hub's cache"),
    ],
)
def test_a_folder_without_a_config_is_named(tmp_path, file, expected):
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    assert expected in refusal(resolve_model, str(tmp_path), None)


def test_a_gguf_beside_them_is_taken(tmp_path):
    (tmp_path / "params.json").touch()
    (tmp_path / "a.gguf").touch()
    assert resolve_model(str(tmp_path), None).gguf_file == "a.gguf"


@pytest.mark.parametrize("config", [True, False])
def test_an_adapter_is_named_with_its_base(model_folder, config):
    folder = model_folder("llama")
    if not config:
        (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    message = refusal(load_model, str(folder))
    assert "an adapter of org/base" in message and "merge_and_unload" in message


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("onnx/model.onnx", "ONNX weights"),
        ("tf_model.h5", "TensorFlow weights"),
        ("flax_model.msgpack", "Flax weights"),
        ("openvino_model.xml", "OpenVINO weights"),
        ("consolidated.safetensors", "layout of its makers"),
        ("__0_0.distcp", "a sharded training checkpoint"),
        ("model-Q4_K.gguf", "give the path of that file"),
        ("notes.txt", "download it again"),
    ],
)
def test_other_weights_beside_a_config_are_named(model_folder, file, expected):
    folder = model_folder("llama")
    (folder / "model.safetensors").unlink()
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).touch()
    message = refusal(load_model, str(folder))
    assert "no weights" in message and expected in message


def test_a_training_checkpoint_with_whole_weights_is_a_model(model_folder):
    folder = model_folder("llama")
    for file in ("optimizer.pt", "scheduler.pt", "trainer_state.json"):
        (folder / file).write_text("{}")
    assert len(load_model(str(folder)).blocks) == 2


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "config of gptq"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"compression_config": {"format": "pack"}}, "compression_config"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "quantization"),
        ({"text_config": {"quantization_config": {"bits": 4}}}, "text_config.quantization_config"),
        ({"quantization_config": None, "quantization": {}, "text_config": {}}, None),
    ],
)
def test_what_a_configuration_says_of_quantisation(model_folder, config, expected):
    found = quantized_by(config)
    assert (found is None) == (expected is None) and (expected or "") in (found or "")
    folder = model_folder("llama")
    own = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(own | config))
    if expected is not None:
        assert "already quantised" in refusal(load_model, str(folder))


@pytest.mark.parametrize(
    "file",
    ["hf_quant_config.json", "quantize_config.json", "quant_config.json", "lrquant.json"],
)
def test_files_that_quantised_checkpoints_have(model_folder, file):
    folder = model_folder("llama")
    (folder / file).write_text('{"base_model": "the-base"}')
    message = refusal(load_model, str(folder))
    assert "already quantised" in message and file in message
    assert file != "lrquant.json" or "start from the-base" in message


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8])
def test_float8_and_integers_are_not_taken_for_weights(model_folder, dtype, name):
    folder = model_folder("llama")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, path)
    message = refusal(load_model, str(folder))
    assert f"stored as {str(dtype).removeprefix('torch.')} (first: {name})" in message
    assert "already quantised" in message
    tensors[name + "_unused"] = tensors.pop(name)
    save_file(tensors, path)
    assert "1 of the model's" in refusal(load_model, str(folder))  # control: its name matters


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_floating_point_is_taken_in_either_file(model_folder, dtype):
    folder = model_folder("llama")
    path = folder / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    expected = str(dtype).removeprefix("torch.")
    assert SafetensorsSource(folder).dtype("model.norm.weight") == expected
    assert load_model(str(folder)).source.dtype("model.norm.weight") == expected
    path.unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert load_model(str(folder)).source.dtype("model.norm.weight") == expected


def test_packed_weights_without_a_word_in_the_config(model_folder):
    folder = model_folder("llama")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.up_proj"
    tensors[f"{name}.qweight"] = tensors.pop(f"{name}.weight").to(torch.int32)
    save_file(tensors, path)
    message = refusal(load_model, str(folder))
    assert f"it holds {name}.qweight" in message and "already quantised" in message


def test_modules_in_memory(make_model):
    model = make_model("llama")
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    assert "in memory: already quantised" in refusal(from_module, model)
    model = make_model("llama")
    model.model.norm.weight.data = model.model.norm.weight.data.to(torch.float8_e4m3fn)
    assert "float8_e4m3fn" in refusal(from_module, model)
    model = make_model("llama")
    wrapped = torch.nn.Module()
    wrapped.base_layer = model.model.layers[0].mlp.up_proj
    wrapped.lora_A = torch.nn.Linear(32, 2)
    model.model.layers[0].mlp.up_proj = wrapped
    assert "lora_A" in refusal(from_module, model) and "merge" in refusal(from_module, model)


def test_a_missing_tokenizer_names_its_files(model_folder):
    folder = model_folder("llama")
    (folder / "tokenizer.json").unlink()
    message = refusal(load_model, str(folder))
    assert "no tokenizer" in message and "tokenizer.json (or tokenizer.model) missing" in message
    (folder / "tokenizer_config.json").unlink()
    assert "and tokenizer_config.json missing" in refusal(load_model, str(folder))


def test_a_gguf_says_what_it_is_unpacked_from():
    kinds = gguf.GGMLQuantizationType

    class Tensor:
        def __init__(self, kind):
            self.tensor_type, self.n_bytes = kind, 9 if kind == kinds.Q8_0 else 5

    stored = (kinds.F32, kinds.Q4_K, kinds.Q4_K, kinds.Q8_0)
    assert quantised_types(map(Tensor, stored)) == "Q4_K and Q8_0"
    assert quantised_types(map(Tensor, (kinds.F32, kinds.BF16))) == ""


def test_the_check_says_it_too_and_nothing_is_learned(model_folder, tmp_path):
    folder = model_folder("llama")
    (folder / "quantize_config.json").write_text("{}")
    done = preflight({"model": str(folder), "scheme": "W4A16"})
    assert any("already quantised" in finding.text for finding in done.failed)
    with pytest.raises(LRQuantError, match="already quantised"):
        quantize(folder, "W4A16", output_dir=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
