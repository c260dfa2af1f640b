"""transform_config: the library that defines it computes what was learned, vLLM's names fit it."""

from __future__ import annotations

import dataclasses
import json
import logging
import re

import pytest
import torch
from compressed_tensors.transform import TransformConfig, apply_transform_config
from compressed_tensors.utils import is_match
from torch import nn
from transformers import AutoModelForCausalLM

from lrquant import LRQuantError, evaluate, export, quantize
from lrquant.blocks.plan import Plan
from lrquant.config.config import Config
from lrquant.config.scheme import Scheme
from lrquant.config.schemes import Schemes
from lrquant.formats.checkpoint import save_checkpoint
from lrquant.formats.choice import choose_format, formats, why_native
from lrquant.formats.parts import Part
from lrquant.formats.transforms import KEY, transform_config
from lrquant.model.loading import from_module
from lrquant.preflight.checks import preflight

FORM = formats()["compressed-tensors"]
TOKENS = {"activation_symmetric": True}
RUNS = [
    ("llama", "W4A16g16-hadamard", {}),
    ("llama", "W3A16", {"scheme_for": ("layers.1.mlp.down_proj=W3A16-hadamard",)}),
    ("llama", "W8A8-sym-qkv16-hadamard", TOKENS),
    ("phi3", "W4A16-sym", {"scheme_for": ("self_attn.qkv_proj=W4A16-sym-hadamard",)}),
    ("opt", "W4A16-sym-hadamard", {"scheme_for": ("layers.0=W8A16-sym",)}),
    ("qwen3_moe", "W4A16-sym", {"scheme_for": ("self_attn=W4A16-sym-hadamard",)}),
]


@pytest.fixture
def learn(make_model, token_ids, tmp_path):
    def run(family, scheme, **settings):
        places = {"output_dir": str(tmp_path / "run"), "save_dir": str(tmp_path / "saved")}
        given = {"precision": "float32", "lr_plus": True, "epochs": 1, "report": False}
        given |= {"format": FORM.name, **places, **settings}
        return quantize(make_model(family), scheme, calibration=token_ids(3, 16), **given)

    return run


def said(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize(("family", "scheme", "settings"), RUNS, ids=str)
def test_the_library_makes_of_it_what_was_learned(
    learn, token_ids, tmp_path, family, scheme, settings
):
    run, ids = learn(family, scheme, **settings), token_ids(2, 20)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    with torch.no_grad():
        learned = run.load_model()(ids).logits
        left_out = model(ids).logits
        config = TransformConfig.model_validate(said(tmp_path / "saved")[KEY])
        apply_transform_config(model, config)
        found = model(ids).logits
    size = float(learned.abs().max())
    assert float((found - learned).abs().max()) < 1e-4 * size
    assert float((left_out - learned).abs().max()) > 1e-2 * size, "or this tells nothing"


@pytest.mark.parametrize("scheme", ["W3A16g16-hadamard", "W8A8-sym-qkv16-hadamard"])
def test_evaluate_measures_it(model_folder, data_dir, tmp_path, scheme):
    measured = {"ppl": ("wikitext2",), "seqlen": 24, "limit": 4, "precision": "float32"}
    run = quantize(
        model_folder("llama"),
        scheme,
        output_dir=str(tmp_path / "run"),
        **{**measured, "nsamples": 2, "epochs": 1, "data_dir": data_dir, "report": False},
        activation_symmetric=True,
    )
    export(str(tmp_path / "run"), str(tmp_path / "saved"), format=FORM.name)
    found = evaluate(str(tmp_path / "saved"), data_dir=data_dir, **measured)["perplexity"]
    learned = run.results["perplexity"]["wikitext2"]["quantized"]
    assert found["wikitext2"]["quantized"] == pytest.approx(learned, rel=1e-3)


def linears(start, modules, count=2, scheme="W4A16-sym"):
    own = Scheme.parse(scheme)
    return {f"{start}.{index}.{module}": own for index in range(count) for module in modules}


ATTENTION = ("self_attn.q_proj", "self_attn.k_proj")
LANGUAGE = "model.language_model.layers"
TOWER = "model.vision_tower.vision_model.encoder.layers"


def llava(size, tower_too):
    """Parts of a model whose tower has linears of the language part's names; what is in neither."""
    mlp = ("mlp.down_proj",)
    schemes = Schemes(Scheme.parse("W4A16-sym"), ())
    own = linears(LANGUAGE, (*ATTENTION, *mlp))
    sizes = {name: size if "self_attn" in name else 512 for name in own}
    parts = [Part(LANGUAGE, schemes, own, (), {}, sizes)]
    tower = linears(TOWER, (*ATTENTION, "mlp.fc2"))
    if tower_too:
        parts.append(Part(TOWER, schemes, tower, (), {}, dict.fromkeys(tower, 128)))
        tower = {}
    return parts, [*tower, "model.multi_modal_projector.linear_1", "lm_head"]


def size_of(config, name):
    """As vLLM finds it (get_linear_transform_schemes): that of the one group that a linear fits."""
    found = None
    for scheme in TransformConfig.model_validate(config).config_groups.values():
        for where in scheme.apply:
            if is_match(name, nn.Linear(1, 1), where.targets, where.ignore):
                assert where.location == "input" and scheme.type == "hadamard"
                assert found is None
                found = scheme.head_dim
    return found


@pytest.mark.parametrize("tower_too", [False, True])
@pytest.mark.parametrize("size", [64, 128, 256])
def test_other_runtimes_names_fit_it(size, tower_too):
    """Whether the language part's attention has smaller matrices than the tower's, or larger."""
    config = transform_config(*llava(size, tower_too))
    for start in (LANGUAGE, "language_model.model.layers", "model.layers"):
        assert size_of(config, f"{start}.1.self_attn.q_proj") == size
        assert size_of(config, f"{start}.1.mlp.down_proj") == 512
        assert size_of(config, f"{start}.1.mlp.gate_proj") is None
    for start in (TOWER, "vision_tower.vision_model.encoder.layers"):
        assert size_of(config, f"{start}.0.self_attn.q_proj") == (128 if tower_too else None)
        assert size_of(config, f"{start}.0.mlp.fc2") == (128 if tower_too else None)
    assert size_of(config, "multi_modal_projector.linear_1") is None


def test_blocks_that_have_none_are_not_meant():
    own = linears("model.layers", ATTENTION, 12)
    some = {name: 64 for name in own if ".1." in name or "10.self_attn.q" in name}
    part = Part("model.layers", Schemes(Scheme.parse("W4A16"), ()), own, (), {}, some)
    config = transform_config([part], ["lm_head"])
    assert {name for name in own if size_of(config, name)} == some.keys()
    assert transform_config([dataclasses.replace(part, hadamard_sizes={})], []) is None


def changed(values, change):
    values = json.loads(json.dumps(values))
    for group in values[KEY]["config_groups"].values():
        change(group)
    return values


@pytest.mark.parametrize(
    "change",
    [
        lambda group: group.update(head_dim=8),
        lambda group: group["apply"][0]["targets"].pop(),
        lambda group: group["apply"][0].update(targets=["Linear"]),
    ],
    ids=["size", "one missing", "classes"],
)
def test_a_wrong_one_is_found_before_it_is_put_in_place(learn, tmp_path, change):
    run = learn("llama", "W4A16-hadamard", save_dir=None, format=None)

    def config(parts, outside):
        return changed(FORM.quantization_config(parts, outside), change)

    wrong = dataclasses.replace(FORM, quantization_config=config)
    with pytest.raises(LRQuantError, match="read back"):
        save_checkpoint(run.workbench, run.config.origin, run.folder, tmp_path / "wrong", wrong)
    assert not (tmp_path / "wrong").exists()


def flipped(tensors):
    """Codes of which the first of a linear is another by one."""
    name = next(key for key in tensors if key.endswith("q_proj.weight_packed"))
    packed = tensors[name].clone()
    packed[0, 0] ^= 1
    return {**tensors, name: packed}


@pytest.mark.parametrize("form", [FORM, formats()["lrquant"]], ids=lambda form: form.name)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_one_changed_code_is_found(learn, tmp_path, form, dtype):
    settings = {"save_dir": None, "format": None, "save_dtype": dtype}
    run = learn("llama", "W8A16-hadamard", **settings)
    wrong = dataclasses.replace(form, tensors=lambda *given: flipped(form.tensors(*given)))
    with pytest.raises(LRQuantError, match=r"read back, .*q_proj.weight is up to"):
        save_checkpoint(run.workbench, run.config.origin, run.folder, tmp_path / "wrong", wrong)


def plan_of(scheme, **settings):
    return Plan.of(Config(scheme=scheme, **settings).resolved().quantizing)


def test_what_other_runtimes_would_leave_out_is_not_chosen_unasked():
    plan = plan_of("W4A16-hadamard")
    assert {choose_format(plan, asked, None).name for asked in ("auto", None)} == {"lrquant"}
    assert "for vLLM alone: --format compressed-tensors" in why_native(plan)
    assert choose_format(plan, None, "vllm") is FORM
    for target in ("transformers", "vllm-cpu"):
        with pytest.raises(LRQuantError, match=r"nearest that it holds is --scheme W4A16,"):
            choose_format(plan, None, target)
    held_elsewhere = plan_of("W4A4-r3-hadamard")
    assert "is --scheme W4A4-sym-qkv16-hadamard --activation_symmetric" in why_native(
        held_elsewhere
    )


def test_the_log_and_the_card_say_who_computes_something_else(learn, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "lrquant"):
        learn("llama", "W4A16-hadamard")
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert any(
        "not for transformers: transformers leaves transform_config out" in w for w in warnings
    )
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "Not for transformers" in card and "apply_transform_config" in card
    assert "no tensor parallelism" in card and "Not for vLLM's CPU build" in card


@pytest.fixture
def refused(make_model, tiny_tokenizer, tmp_path):
    """refused(family, **settings) -> what a pre-flight says that would fail"""

    def make(family, **settings):
        data = tmp_path / "text.txt"
        data.write_text("some words, and some more of them. " * 20)
        asked = {"calib_dataset": str(data), "nsamples": 1, "seqlen": 16, "report": False}
        places = {"output_dir": str(tmp_path / "run"), "save_dir": str(tmp_path / "saved")}
        model = from_module(make_model(family), tiny_tokenizer)
        return [
            finding.text for finding in preflight({**asked, **places, **settings}, model).failed
        ]

    return make


def test_experts_have_none(refused):
    (text,) = refused("qwen3_moe", scheme="W4A16-hadamard", format=FORM.name)
    assert "what experts read" in text and "give experts W4A16-sym and all else" in text
    mended = {"scheme": "W4A16-sym-hadamard", "scheme_for": ("mlp.experts=W4A16-sym",)}
    assert refused("qwen3_moe", format=FORM.name, **mended) == []


def test_vllm_adds_no_biases_beside_them(refused):
    settings = {"scheme": "W4A16-hadamard", "target": "vllm"}
    (text,) = refused("qwen2", **settings)
    assert "self_attn.q_proj=W4A16'" in text and "adds no biases" in text
    mended = tuple(f"self_attn.{name}_proj=W4A16" for name in "qkv")
    assert refused("qwen2", **settings, scheme_for=mended) == []
    assert refused("qwen2", **settings, format="dequantized") == []


@pytest.mark.parametrize("family", ["phi3", "falcon", "falcon_h1", "opt"])
def test_vllm_knows_of_some_linears_alone(refused, family):
    """Of others it would raise an error while it loads, or leave the matrices out."""
    settings = {"scheme": "W4A16-sym-hadamard", "target": "vllm"}
    (text,) = refused(family, **settings)
    assert "by no name" in text
    flags = re.findall(r"--scheme-for '(.+?)'", text)
    mended = {**settings, "scheme_for": tuple(flags)}
    if not flags:
        assert text.endswith("is --scheme W4A16-sym")
        mended = {**settings, "scheme": "W4A16-sym"}
    assert refused(family, **mended) == []
