"""Experts in every format: one linear each, by the names of published files, and read back."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from lrquant import quantize
from lrquant.errors import LRQuantError
from lrquant.formats.verification import verify
from lrquant.model.loading import from_module

FAMILIES = pytest.mark.parametrize("name", ["qwen3_moe-unlike", "mixtral", "qwen2_moe"])
FORMATS = {
    "dequantized": "W4A16g16",
    "compressed-tensors": "W4A16g16-sym",
    "lrquant": "W4A4",
}
EXPERT = re.compile(r"(.*\.experts\.\d+\.\w+)\.(\w+)$")


def tensors_of(folder) -> dict[str, torch.Tensor]:
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


@pytest.fixture
def written(make_model, token_ids, tiny_tokenizer, tmp_path):
    def write(name: str, form: str, scheme: str, changes=None, **settings):
        return quantize(
            make_model(name, **(changes or {})),
            scheme,
            calibration=token_ids(3, 16),
            tokenizer=tiny_tokenizer,
            output_dir=str(tmp_path / "run"),
            save_dir=str(tmp_path / "saved"),
            format=form,
            **{
                "epochs": 1,
                "precision": "float32",
                "report": False,
                "lwc": True,
                "expert_tokens": 0,
                **settings,
            },
        )

    return write


@FAMILIES
@pytest.mark.parametrize("form", FORMATS)
def test_names_are_published_ones_and_logits_those_learned(
    form, name, written, make_model, token_ids, assert_alike, tmp_path
):
    run, module, place = written(name, form, FORMATS[form]), make_model(name), tmp_path / "saved"
    published = revert_weight_conversion(module, module.state_dict())
    stored = tensors_of(place)
    experts = {match[1] for match in map(EXPERT.match, published) if match}
    assert experts and experts == {match[1] for match in map(EXPERT.match, stored) if match}
    whole = {key for key in published if not key.endswith("_proj.weight") and "experts" not in key}
    assert whole <= stored.keys(), "the router among them"
    if form == "dequantized":
        assert stored.keys() == published.keys()
        assert {n: t.shape for n, t in stored.items()} == {n: t.shape for n, t in published.items()}
    ids = token_ids(2, 12)
    learned = run.load_model()(ids).logits
    read = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    if form == "lrquant":
        assert_alike(read(ids).logits, learned)
    else:
        torch.testing.assert_close(read(ids).logits, learned, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(module(ids).logits, learned, atol=1e-3), "nothing was quantised"
    checked = verify(place)
    assert not checked.problems and checked.bits_per_weight < (33 if form == "dequantized" else 9)


def test_each_expert_has_its_published_name(variant, make_model):
    """As transformers itself writes it; but for the base model's name, which files have or not."""
    module = make_model(variant)
    model = from_module(module)
    written = revert_weight_conversion(module, module.state_dict())
    expected = {re.sub(r"^\w+\.", "", match[1]) for match in map(EXPERT.match, written) if match}
    names = (model.block_name(index) for index in range(len(model.blocks)))
    own = {f"{name}.{each}" for name in names for each in model.published.alone(name)}
    assert {re.sub(r"^\w+\.", "", model.published.name(name)) for name in own} == expected


def test_a_native_checkpoint_is_packed_again_when_transformers_saves_it(
    written, token_ids, tmp_path
):
    written(
        "mixtral", "lrquant", "W4A4", scheme_for=("experts.1=W8A4", "layers.1.mlp.experts=W16A16")
    )
    ids, place, again = token_ids(2, 12), tmp_path / "saved", tmp_path / "again"
    read = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    read.save_pretrained(again)
    before, after = tensors_of(place), tensors_of(again)
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    other = AutoModelForCausalLM.from_pretrained(again, dtype=torch.float32).eval()
    assert torch.equal(read(ids).logits, other(ids).logits)


def test_configuration_names_routers_as_left_alone_and_experts_decoded(written, tmp_path):
    """What vLLM takes of an expert is by `EXPERTS.0.GATE`, of a router by what is ignored."""
    written("mixtral", "compressed-tensors", "W4A16g16-sym", epochs=0)
    values = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    routers = [f"model.layers.{block}.block_sparse_moe.gate" for block in range(2)]
    assert values["ignore"] == ["lm_head", *routers] and values["dequantize"] is True
    assert values["config_groups"]["group_0"]["targets"] == ["Linear"]


@pytest.mark.parametrize(
    "form, scheme, said",
    [
        ("compressed-tensors", "W4A16g16", "use --scheme W4A16g16-sym, to be asked for before"),
        ("compressed-tensors", "W4A8-sym-qkv16", "use --scheme W4A16-sym, to be asked"),
        ("awq", "W4A16g32", "it holds no experts"),
        ("lrquant", "W4A4", "experts of 16-bit weights beside others"),
    ],
)
def test_what_would_be_read_wrongly_is_refused(form, scheme, said, written, tmp_path):
    with pytest.raises(LRQuantError, match=said):
        others = {"activation_symmetric": True, "changes": {"intermediate_size": 64}}
        odd = ("experts.2=W16A4",) if form == "lrquant" else ()
        written("olmoe", form, scheme, scheme_for=odd, **others)
    assert not (tmp_path / "run").exists()


def test_experts_that_are_published_in_one_tensor_are_packed_each_for_the_runtime(
    written, token_ids, assert_alike, tmp_path
):
    """But for those of a block that stay in floating point, which stay in one."""
    run = written("granitemoe", "lrquant", "W4A4", scheme_for=("layers.1.*.experts=W16A16",))
    stored, ids, place = tensors_of(tmp_path / "saved"), token_ids(2, 12), tmp_path / "saved"
    experts = {name for name in stored if ".experts." in name}
    own = {name.partition(".experts.")[2].split(".")[0] for name in experts if "layers.0." in name}
    assert own == {"0", "1", "2", "3"}
    start = "model.layers.1.block_sparse_moe.experts"
    assert {name for name in experts if name.startswith(start)} == {
        f"{start}.{name}" for name in ("gate_up_proj", "down_proj")
    }
    read = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    assert_alike(read(ids).logits, run.load_model()(ids).logits)
    assert not verify(place).problems


def test_experts_that_are_published_in_one_tensor_are_not_packed(written):
    with pytest.raises(LRQuantError, match=r"experts.gate_up_proj: holds several matrices in one"):
        written("granitemoe", "compressed-tensors", "W4A16g16-sym")


def test_files_whose_experts_have_other_names_are_one_tensor(make_model):
    """Declared names that no published file has: the parameter is written whole."""
    model = from_module(make_model("qwen3_moe"))
    block = model.block_name(0)
    assert len(model.published.alone(block)) == 12 and model.published.apart
    odd = type(model.published)(
        model.skeleton,
        {block: [m for m in from_module(make_model("mixtral")).matrices(0)]},
    )
    assert not odd.apart and odd.name("model.layers.0.mlp.gate") == "model.layers.0.mlp.gate"


@pytest.mark.parametrize("form, scheme", [("dequantized", "W4A16"), ("lrquant", "W4A4")])
def test_what_corrects_a_router_stays_in_float32(form, scheme, written, tmp_path):
    """As transformers keeps it: in the dtype of the rest its last bits would change experts."""
    written("ernie4_5_moe", form, scheme, epochs=0, save_dtype="bfloat16")
    stored = tensors_of(tmp_path / "saved")
    kinds = {tensor.dtype for name, tensor in stored.items() if "moe_statics" in name}
    kinds |= {t.dtype for name, t in stored.items() if name.endswith("1.mlp.gate.weight")}
    assert kinds == {torch.float32} and stored["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert not verify(tmp_path / "saved").problems


def test_a_run_whose_last_block_is_missing_goes_on_to_the_same(written, tmp_path):
    settings = {"let": True, "lr_plus": True}
    run = written("qwen2_moe", "lrquant", "W4A4", **settings)
    whole = [run.folder.load_block(block) for block in range(2)]
    before = tensors_of(tmp_path / "saved")
    run.folder.block_path(1).unlink()
    again = written(
        "qwen2_moe", "lrquant", "W4A4", resume=str(tmp_path / "run"), overwrite=True, **settings
    )
    for block, learned in enumerate(whole):
        own = again.folder.load_block(block)
        assert own.keys() == learned.keys()
        assert all(torch.equal(tensor, own[name]) for name, tensor in learned.items())
    after = tensors_of(tmp_path / "saved")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert any(".mlp.experts.2.up_proj.upper" in name for name in ["." + n for n in whole[1]])
