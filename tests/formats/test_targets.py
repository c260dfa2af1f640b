"""--target: what a runtime loads, and the nearest settings that one of its formats can hold."""

from __future__ import annotations

import pytest

from lrquant import LRQuantError, quantize
from lrquant.blocks.plan import Plan
from lrquant.config.config import Config
from lrquant.config.core import TARGETS
from lrquant.config.scheme import Scheme
from lrquant.formats.choice import choose_format, formats
from lrquant.formats.format import Format
from lrquant.formats.kernels import fused_matrices
from lrquant.model.loading import from_module


def config_of(scheme, target, **settings):
    return Config(scheme=scheme, target=target, **settings).resolved()


def chosen(config):
    return choose_format(Plan.of(config.quantizing), config.format, config.target)


@pytest.mark.parametrize("target", ["vllm", "transformers"])
@pytest.mark.parametrize("scheme", ["W4A16", "W4A16g128", "W4A16g32-sym", "W8A16", "W3A16-sym"])
def test_compressed_tensors_is_the_first_choice(scheme, target):
    assert chosen(config_of(scheme, target)).name == "compressed-tensors"


def test_symmetric_activations_are_loaded():
    settings = {"activation_symmetric": True}
    assert chosen(config_of("W8A8-sym-qkv16", "vllm-cpu", **settings))
    for scheme in ("W8A8-sym-qkv16", "W4A8g128-sym-qkv16", "W4A4-sym-qkv16"):
        for target in ("vllm", "transformers"):
            form = chosen(config_of(scheme, target, **settings))
            assert form.name == "compressed-tensors"


def test_sixteen_bits_need_no_packing():
    assert chosen(config_of("W16A16", "vllm")).name == "dequantized"


@pytest.mark.parametrize(
    ("scheme", "target", "settings", "parts"),
    [
        (
            *("W4A4", "vllm", {}),
            ["cannot hold asymmetric weights, asymmetric activations and 4-bit Q, K and V of W4A4"],
        ),
        ("W4A4", "transformers", {}, ["--scheme W4A4-sym-qkv16 --activation_symmetric"]),
        ("W6A6", "transformers", {}, ["6-bit", "--scheme W8A8-sym-qkv16 --activation_symmetric"]),
        ("W4A4-sym-qkv16", "vllm", {}, ["cannot hold asymmetric activations of", "--activation_s"]),
        ("W8A8-sym", "vllm", {"activation_symmetric": True}, ["8-bit Q", "W8A8-sym-qkv16,"]),
        ("W3A16", "vllm", {}, ["asymmetric weights of W3A16", "--scheme W3A16-sym,"]),
        ("W2A16g64", "vllm", {}, ["--scheme W2A16g64-sym,"]),
        ("W7A16", "vllm", {}, ["asymmetric weights of W7A16", "--scheme W7A16-sym,"]),
        ("W3A16-sym", "vllm-cpu", {}, ["3-bit weights", "--scheme W4A16-sym,"]),
        ("W8A16", "vllm-cpu", {}, ["8-bit weights of W8A16", "--scheme W4A16,"]),
        (
            *("W4A8-sym-qkv16", "vllm-cpu", {"activation_symmetric": True}),
            ["4-bit weights of", "--scheme W8A8-sym-qkv16,"],
        ),
        ("W4A16g16", "vllm", {}, ["groups of 16", "--scheme W4A16g32,"]),
        (
            *("W4A16", "vllm", {"lr_plus": True, "rotation_sharing": "linear"}),
            ["cannot hold --rotation_sharing linear", "is --rotation_sharing site,"],
        ),
        (
            *("W4A16", "transformers", {"lr_plus": True, "rotate_rank": 2}),
            ["--rotation_sharing weight", "is --rotate_rank 1 --rotation_sharing site,"],
        ),
        (
            "W4A4",
            "native",
            {"lr_plus": True, "rotate_rank": 2},
            ["is --rotate_rank 1 --rotation_sharing site"],
        ),
        (
            *("W4A4-r3-hadamard", "transformers", {"lac": True}),
            [
                "4-bit Q, K and V, Hadamard matrices and --lac of",
                "--scheme W4A4-sym-qkv16 --activation_symmetric --no-lac,",
            ],
        ),
        ("W4A4", "vllm", {"format": "dequantized"}, ["quantizers", "--scheme W4A16"]),
        ("W3A16", "vllm", {"format": "compressed-tensors"}, ["zero points", "--scheme W3A16-sym"]),
        (
            "W4A16",
            "vllm",
            {"format": "lrquant"},
            ["use --target native", "leave --format or --target"],
        ),
        ("W4A16", "vllm", {"format": "gguf"}, ["use one of"]),
    ],
)
def test_what_a_target_cannot_hold(scheme, target, settings, parts):
    with pytest.raises(LRQuantError) as error:
        chosen(config_of(scheme, target, **settings))
    text = str(error.value)
    assert "\n" not in text and (f"--target {target}" in text or "gguf" in text)
    for part in parts:
        assert part in text


@pytest.mark.parametrize("scheme", ["W4A4", "W6A6", "W2A16g64", "W8A8-sym"])
def test_the_nearest_is_held_when_it_is_asked_for(scheme):
    """What the message advises, given back as settings, is accepted."""
    with pytest.raises(LRQuantError) as error:
        chosen(config_of(scheme, "vllm"))
    flags = str(error.value).split("the nearest that it holds is ")[1].split(",")[0].split()
    settings = {"activation_symmetric": "--activation_symmetric" in flags}
    wanted = flags[flags.index("--scheme") + 1]
    assert chosen(config_of(wanted, "vllm", **settings)).name == "compressed-tensors"


@pytest.mark.parametrize("scheme", ["W4A4", "W6A6", "W8A8", "W3A16g64"])
def test_the_native_format_is_chosen_for_its_runtime(scheme):
    assert chosen(config_of(scheme, "native")).name == "lrquant"


def test_a_target_that_no_format_serves(monkeypatch):
    known = {name: form for name, form in formats().items() if name != "lrquant"}
    monkeypatch.setattr("lrquant.formats.choice.formats", lambda: known)
    with pytest.raises(LRQuantError, match=r"--target native: no format here .*; use another"):
        chosen(config_of("W4A4", "native"))


def test_every_format_says_who_loads_it():
    undeclared = Format("x", lambda config: None, lambda *a: {}, lambda *a: None)
    for target in TARGETS:
        assert undeclared.loading(Scheme(), target).refusal, "a format is loadable unless it says"
        for form in formats().values():
            loading = form.loading(Scheme(4, 16, 128), target)
            assert loading.refusal != undeclared.loading(Scheme(), target).refusal, form.name


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"scheme": "W4A4"}, "--scheme W4A4-sym-qkv16 --activation_symmetric"),
        ({"scheme": "W4A16", "let": True, "let_shift": "always"}, "learn with --let_shift auto"),
    ],
)
def test_a_run_is_refused_before_learning_even_without_save_dir(
    make_model, token_ids, tmp_path, settings, said
):
    with pytest.raises(LRQuantError) as error:
        quantize(
            make_model("llama"),
            calibration=token_ids(2, 16),
            output_dir=str(tmp_path / "run"),
            **{"target": "vllm", "epochs": 1, **settings},
        )
    assert said in str(error.value) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
    quantize(  # without a target the same run goes through
        make_model("llama"),
        calibration=token_ids(2, 16),
        output_dir=str(tmp_path / "run"),
        **{"epochs": 1, "report": False, **settings},
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target": "vllm"}, "--target vllm: cannot hold"),
        ({"format": "awq"}, "--format awq: "),
        ({"format": "gguf"}, "--format gguf: use one of"),
    ],
)
def test_settings_are_refused_before_the_model_is_read(tmp_path, settings, said):
    """Reading it can take longer than all else that is done before learning."""
    places = {"output_dir": str(tmp_path / "run"), "save_dir": str(tmp_path / "saved")}
    with pytest.raises(LRQuantError, match=said):
        quantize(str(tmp_path / "no model"), "W4A4", **places, **settings)
    with pytest.raises(LRQuantError, match="no model"):  # what can be held gets as far as that
        quantize(str(tmp_path / "no model"), "W4A4", **places, format="lrquant")


def test_the_target_goes_with_the_run(make_model, token_ids, tmp_path):
    run = quantize(
        make_model("llama"),
        "W4A16g16",
        calibration=token_ids(2, 16),
        output_dir=str(tmp_path / "run"),
        save_dir=str(tmp_path / "saved"),
        **{"target": "transformers", "epochs": 1, "report": False},
    )
    assert run.folder.config.target == "transformers"
    assert (tmp_path / "saved" / "config.json").read_text().count("compressed-tensors") == 1


QKV = tuple(f"self_attn.{name}_proj" for name in "qkv")
OUTPUT, GATE_UP, DOWN = ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)


@pytest.mark.parametrize(
    "name, fused",
    [
        ("llama", [QKV, OUTPUT, GATE_UP, DOWN]),
        ("cohere2", [QKV, OUTPUT, GATE_UP, DOWN]),  # attention and MLP read one norm
        ("olmo2", [QKV, OUTPUT, GATE_UP, DOWN]),  # norms come after
        ("apertus", [QKV, OUTPUT, ("mlp.up_proj",), DOWN]),
        ("gpt_neox", [("attention.query_key_value",), ("attention.dense",)]),
        ("phi3", [tuple(f"self_attn.qkv_proj.{part}" for part in "qkv"), OUTPUT]),
    ],
)
def test_what_runtimes_make_one_product_of(name, fused, make_model):
    assert fused_matrices(from_module(make_model(name)), 0)[: len(fused)] == fused
