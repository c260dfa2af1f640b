"""Tokenizer, processor and configuration of a checkpoint: the source's own, for old readers too."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lrquant import quantize
from lrquant.cli import main
from lrquant.files.manifest import MANIFEST
from lrquant.formats.model_config import write_model_config
from lrquant.formats.side_files import copy_side_files
from lrquant.model.loading import from_module, load_model

PLACE = "/home/somebody/cache"


@pytest.fixture
def export(tmp_path, token_ids):
    def run(model, scheme="W4A16", **settings):
        quantize(
            model,
            scheme,
            calibration=token_ids(3, 16),
            output_dir=str(tmp_path / "run"),
            save_dir=str(tmp_path / "saved"),
            **{"precision": "float32", "epochs": 0, "report": False, "format": "dequantized"},
            **settings,
        )
        return tmp_path / "saved"

    return run


def edit(path, **changes):
    values = json.loads(path.read_text())
    values |= changes
    path.write_text(json.dumps({key: v for key, v in values.items() if v is not ...}))


def older(folder):
    """A folder's config.json as version 4 of transformers writes it, with another rotary base."""
    edit(
        folder / "config.json",
        rope_parameters=...,
        rope_theta=500000.0,
        rope_scaling=None,
        dtype=...,
        torch_dtype="float32",
        transformers_version="4.40.0",
    )
    return folder


def test_files_of_the_source_keep_every_byte(model_folder, export):
    folder = older(model_folder("llama"))
    edit(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", backend=...)
    core = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(core, indent=7))
    texts = {
        **{
            "special_tokens_map.json": '{"bos_token":  "<s>"}',
            "chat_template.jinja": "{{ 1 }}\r\n",
        },
        **{"generation_config.json": '{"temperature":0.5}', "LICENSE": "mine", "merges.txt": "a b"},
        **{"preprocessor_config.json": '{ "size": 3 }', "chat_template.json": "{ }"},
    }
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode())
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    saved = export(str(folder))
    for name in (*texts, "tokenizer.json", "tokenizer_config.json"):
        assert (saved / name).read_bytes() == (folder / name).read_bytes(), name
    assert (saved / "additional_chat_templates" / "tools.jinja").read_text() == "{{ tools }}"
    listed = json.loads((saved / MANIFEST).read_text())["files"]
    assert "additional_chat_templates/tools.jinja" in listed
    assert main(["inspect", str(saved)]) == 0


def test_code_pickles_and_other_weights_are_left_out_and_named(model_folder, export, caplog):
    folder = model_folder("llama")
    names = ["modeling_x.py", "tokenizer.model.pkl", "training_args.bin", "optimizer.pt", "x.onnx"]
    for name in names:
        (folder / name).write_bytes(b"x")
    with caplog.at_level("INFO", logger="lrquant"):
        saved = export(str(folder))
    assert not {path.name for path in saved.iterdir()} & set(names)
    (line,) = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert all(name in line for name in names if not name.endswith(".bin")), line


def test_code_and_places_of_this_machine_are_not_passed_on(model_folder, tmp_path):
    folder = model_folder("llama")
    local = {"_name_or_path": PLACE, "cache_dir": PLACE, "auto_map": {"AutoConfig": "x.Config"}}
    model = load_model(str(folder))
    edit(folder / "config.json", **local)
    edit(folder / "tokenizer_config.json", **local, special_tokens_map_file=PLACE + "/map.json")
    write_model_config(model, torch.float32, None, tmp_path)
    copy_side_files(model, tmp_path)
    for name in ("config.json", "tokenizer_config.json"):
        text = (tmp_path / name).read_text()
        assert PLACE not in text and "auto_map" not in text, name
        assert (PLACE in (folder / name).read_text()) and "auto_map" in (folder / name).read_text()


def test_a_configuration_in_old_words_keeps_them(model_folder, export):
    folder = older(model_folder("llama"))
    saved = export(str(folder), "W4A16g16")
    source, found = (json.loads((p / "config.json").read_text()) for p in (folder, saved))
    changed = {key for key in found if found[key] != source.get(key)}
    assert changed == {"dtype"} and source.keys() <= found.keys(), "float32 as it was"
    assert AutoConfig.from_pretrained(saved).rope_parameters["rope_theta"] == 500000.0


@pytest.mark.parametrize("source", ["folder", "memory"])
def test_a_configuration_in_new_words_says_the_old_ones_too(
    variant, model_folder, make_model, tmp_path, source
):
    folder = model_folder(variant)
    model = load_model(str(folder)) if source == "folder" else from_module(make_model(variant))
    place = tmp_path / "place"
    place.mkdir()
    write_model_config(model, torch.bfloat16, None, place)
    values = json.loads((place / "config.json").read_text())
    assert values["torch_dtype"] == values["dtype"] == "bfloat16"
    assert values["architectures"] == [type(model.skeleton).__name__]
    read = AutoConfig.from_pretrained(place).to_dict()
    expected = model.skeleton.config.to_dict()
    own = {"dtype", "architectures", "_name_or_path", "transformers_version", "rope_theta"}
    own |= {"rope_local_base_freq", "rope_scaling", "partial_rotary_factor"}
    assert {k: v for k, v in read.items() if k not in own} == {
        k: v for k, v in expected.items() if k not in own
    }
    rope = expected.get("rope_parameters")
    if rope is None or variant.startswith("gemma4"):
        assert "rope_theta" not in values
    elif "full_attention" in rope:
        assert values["rope_theta"] == rope["full_attention"]["rope_theta"]
        assert values["rope_local_base_freq"] == rope["sliding_attention"]["rope_theta"]
    else:
        scaled = rope["rope_type"] != "default"
        for key in ("rope_theta", "partial_rotary_factor"):
            assert values.get(key) == rope.pop(key, None)
        assert (values["rope_scaling"] is not None) == scaled
        if scaled:
            assert values["rope_scaling"] == rope


def test_a_tokenizer_without_a_folder_is_written_for_old_readers(
    make_model, tiny_tokenizer, tmp_path
):
    copy_side_files(from_module(make_model("llama"), tiny_tokenizer), tmp_path)
    values = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert values["tokenizer_class"] == "PreTrainedTokenizerFast" and "backend" not in values
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert read("some <s> words").input_ids == tiny_tokenizer("some <s> words").input_ids


def test_a_tokenizer_in_words_of_version_5_is_written_for_old_readers(model_folder, tmp_path):
    folder = model_folder("llama")
    edit(folder / "tokenizer_config.json", extra_special_tokens=["<x>"])
    copy_side_files(load_model(str(folder)), tmp_path)
    values = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert values["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert values["additional_special_tokens"] == ["<x>"] and "extra_special_tokens" not in values


def test_tensors_that_no_module_holds_keep_their_bytes(model_folder, export, tensors_of):
    folder = model_folder("llama")
    weights = load_file(folder / "model.safetensors")
    extra = {
        "mtp.layers.0.up.weight": torch.randn(4, 8).to(torch.float8_e4m3fn),
        "mtp.layers.0.up.weight_scale_inv": torch.rand(1, 1),
        "mtp.norm.weight": torch.randn(8).to(torch.float16),
    }
    save_file(weights | extra, folder / "model.safetensors", metadata={"format": "pt"})
    saved = export(str(folder), "W4A16g16", save_dtype="bfloat16")
    found = tensors_of(saved)
    for name, tensor in extra.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert found["model.norm.weight"].dtype == torch.bfloat16
    assert main(["inspect", str(saved)]) == 0
    packed = ["export", str(saved.parent / "run"), str(saved.parent / "packed")]
    assert main([*packed, "--format", "compressed-tensors"]) == 0
    config = json.loads((saved.parent / "packed" / "config.json").read_text())
    ignored = config["quantization_config"]["ignore"]
    assert {"lm_head", "mtp.layers.0.up", "mtp.norm"} <= set(ignored)


@pytest.fixture
def wrongly_tied(model_folder):
    """A folder whose config.json says tied embeddings while its file has a head of its own."""
    folder = model_folder("llama")
    edit(folder / "config.json", tie_word_embeddings=True)
    return folder


def test_ties_are_what_the_tensors_are(wrongly_tied, export, token_ids, make_model):
    assert not load_model(str(wrongly_tied)).tied_names
    saved = export(str(wrongly_tied), "W8A16")
    assert json.loads((saved / "config.json").read_text())["tie_word_embeddings"] is False
    found, ids = AutoModelForCausalLM.from_pretrained(saved), token_ids(2, 20)
    torch.testing.assert_close(found.lm_head.weight, make_model("llama").lm_head.weight)
    torch.testing.assert_close(
        found(ids).logits, make_model("llama")(ids).logits, rtol=0.05, atol=0.2
    )
    assert main(["inspect", str(saved)]) == 0


def test_a_tied_head_that_is_stored_twice_is_written_once(model_folder, export, tensors_of):
    folder = model_folder("llama-tied")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    saved = export(str(folder))
    assert json.loads((saved / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in tensors_of(saved)


def test_equal_tensors_of_an_untied_model_stay_two(make_model, export, tensors_of):
    model = make_model("llama")
    model.lm_head.weight.data = model.model.embed_tokens.weight.data.clone()
    saved = export(model)
    assert json.loads((saved / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in tensors_of(saved)
