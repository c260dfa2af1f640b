"""Runtimes in words: in the run's log, in the model card, of models of two parts."""

from __future__ import annotations

import logging

import pytest

from lrquant import export, quantize
from lrquant.config.config import Config
from lrquant.config.core import TARGETS
from lrquant.config.scheme import Scheme
from lrquant.formats.choice import formats
from lrquant.formats.loading import AS_LEARNED, Loading, merged
from lrquant.formats.targets import loading_of, verdicts

W4A8 = {"scheme": "W4A8-sym-qkv16", "activation_symmetric": True}


def loading(scheme, target, form="compressed-tensors"):
    return formats()[form].loading(Scheme.parse(scheme), target)


@pytest.mark.parametrize("scheme", ["W4A8-sym-qkv16", "W4A4-sym-qkv16", "W4A8g64-sym-qkv16"])
def test_four_bit_weights_and_quantised_activations(scheme):
    """vLLM's own choice of kernel leaves activations as they are; its CPU build has no other."""
    assert "16 bits" in loading(scheme, "vllm-cpu").refusal
    cuda = loading(scheme, "vllm")
    assert cuda.refusal is None and not cuda.as_learned
    assert cuda.serve == "vllm serve FOLDER --linear-backend humming"
    assert loading(scheme, "transformers").as_learned


@pytest.mark.parametrize("form", ["compressed-tensors", "awq"])
@pytest.mark.parametrize("scheme", ["W4A16", "W4A16g64", "W4A16g128-sym"])
def test_sixteen_bit_activations_on_cpus_with_amx(scheme, form):
    cpu = loading(scheme, "vllm-cpu", form)
    assert "on CPUs with AMX, in bfloat16, 8-bit activations" in cpu.computes
    assert cpu.serve.startswith("VLLM_CPU_INT4_W4A8=0 ") and cpu.multiple == 32
    assert any("VLLM_CPU_INT4_W4A8=0" in note for note in loading(scheme, "vllm", form).notes)


def test_the_steps_of_eight_bit_activations_are_told():
    for target in ("vllm", "vllm-cpu"):
        told = loading("W8A8-sym-qkv16", target)
        assert told.as_learned and any("127 steps" in note for note in told.notes)


@pytest.mark.parametrize("scheme", ["W2A16", "W3A16-sym", "W5A16", "W6A16-sym", "W7A16", "W8A16"])
def test_vllm_on_a_cpu_has_kernels_for_four_bits_alone(scheme):
    assert loading(scheme, "vllm-cpu").refusal
    assert any("CPU build" in note for note in loading(scheme, "vllm").notes) or (
        "zero points" in loading(scheme, "vllm").refusal
    )


def test_parts_are_merged():
    plain = Loading(notes=("a",), multiple=32)
    other = Loading(notes=("a", "b"), computes="else", serve="this", multiple=48)
    assert merged([plain, plain]) == Loading(notes=("a",), multiple=32)
    assert merged([plain, other]) == Loading(None, ("a", "b"), "else", "this", 96)
    assert merged([plain, Loading("no")]).refusal == "no"


def test_a_tower_counts():
    settings = {"scheme": "W4A16-sym", "vision_scheme": "W4A8-sym-qkv16"}
    config = Config(**settings, activation_symmetric=True).resolved()
    form = formats()["compressed-tensors"]
    assert "humming" in loading_of(form, config.schemes, "vllm").computes
    assert loading_of(form, config.schemes, "vllm-cpu").refusal


def test_every_runtime_that_loads_has_a_verdict():
    for name, form in formats().items():
        config = Config(scheme="W4A16").resolved()
        said = [text.split(" computes ")[0] for _, text in verdicts(form, config.schemes, None)]
        assert said == [
            target for target in TARGETS if not form.loading(config.quantization, target).refusal
        ], name


def test_the_log_and_the_card_say_it(make_model, token_ids, tmp_path, caplog):
    places = {"output_dir": str(tmp_path / "run"), "save_dir": str(tmp_path / "saved")}
    settings = {**places, **W4A8, "epochs": 0, "report": False}
    with caplog.at_level(logging.INFO, "lrquant"):
        quantize(make_model("llama"), calibration=token_ids(2, 16), **settings)
    said = {r.getMessage(): r.levelno for r in caplog.records if " computes " in r.getMessage()}
    assert said.pop(f"compressed-tensors: transformers computes {AS_LEARNED}") == logging.INFO
    ((text, level),) = said.items()
    assert "vllm computes 16-bit activations" in text and level == logging.WARNING
    assert text in (tmp_path / "run" / "run.log").read_text()
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "vllm serve . --linear-backend humming --dtype" in card
    assert "It computes 16-bit activations wherever" in card
    assert "Not for vLLM's CPU build: it leaves activations" in card
    assert f"It computes {AS_LEARNED}. Note: transformers emulates" in card


def test_an_export_says_it(model_folder, tmp_path, caplog):
    text = tmp_path / "text.txt"
    text.write_text("some words, and some more of them. " * 20)
    data = {"calib_dataset": str(text), "nsamples": 2, "seqlen": 16, "epochs": 0}
    run = str(tmp_path / "run")
    quantize(model_folder("llama"), output_dir=run, report=False, **data, **W4A8)
    with caplog.at_level(logging.INFO, "lrquant"):
        export(run, str(tmp_path / "packed"))
    assert "vllm computes 16-bit activations" in caplog.text
