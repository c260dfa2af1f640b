"""The families that are served: a file each, by transformers' model types; others are refused."""

from __future__ import annotations

import copy
import importlib
import re
from pathlib import Path

import pytest
from transformers import AutoConfig, GPT2Config, PretrainedConfig

import lrquant
from lrquant.architectures import Architecture, architecture_of, architectures, towers
from lrquant.errors import LRQuantError


def require_tiny_configs(served: dict[str, Architecture], tiny: dict[str, PretrainedConfig]):
    covered = {config.model_type for config in tiny.values()}
    missing = sorted(set(served) - covered)
    if missing:
        pytest.fail(
            f"no test runs for {', '.join(missing)}: add a tiny config of each to TINY in "
            "tests/conftest.py"
        )


def test_every_family_has_a_tiny_config(tiny_configs):
    """Those that read pictures have theirs in tests/vision."""
    served = architectures().items()
    of_text = {key: f for key, f in served if f.tower is None and not f.reads_pixels}
    require_tiny_configs(of_text, tiny_configs)


def test_a_family_without_a_tiny_config_is_noticed(tiny_configs):
    served = {**architectures(), "new": architectures()["llama"]}
    with pytest.raises(pytest.fail.Exception, match=r"new.*: add a tiny config"):
        require_tiny_configs(served, tiny_configs)


def test_every_file_is_a_family_or_is_used_by_one():
    """A file without ARCHITECTURE or TOWER would be passed over in silence."""
    folder = Path(lrquant.__file__).parent / "architectures"
    sources = {path.stem: path.read_text() for path in folder.glob("*.py") if path.stem[0] != "_"}
    modules = [importlib.import_module(f"lrquant.architectures.{name}") for name in sources]
    declared = [getattr(m, each, None) for m in modules for each in ("ARCHITECTURE", "TOWER")]
    families = {each.name for each in declared if each is not None}
    assert families <= set(sources), "a family's file has its name"
    assert families <= {each.name for each in (*architectures().values(), *towers().values())}
    for helper in set(sources) - families:
        pattern = rf"(import.*|architectures\.)\b{helper}\b"
        used = [name for name in set(sources) - {helper} if re.search(pattern, sources[name])]
        assert used, f"{helper}.py declares no ARCHITECTURE and no family imports it"


REFUSED_BY_DEFAULT = {"mllama"}  # for what its usual configuration has


@pytest.mark.parametrize("model_type", sorted(set(architectures()) - REFUSED_BY_DEFAULT))
def test_model_types_are_those_of_transformers(model_type):
    architecture = architectures()[model_type]
    assert model_type in architecture.model_types
    assert architecture_of(AutoConfig.for_model(model_type)) is architecture


def refused(config: PretrainedConfig) -> str:
    with pytest.raises(LRQuantError) as caught:
        architecture_of(config)
    return str(caught.value)


def test_an_unknown_family_is_refused_with_the_nearest_and_the_guide():
    message = refused(GPT2Config(n_layer=2))
    assert message.startswith(
        "model family 'gpt2' is not declared; the nearest that is declared is"
    )
    assert "this one's blocks have attn.c_attn" in message
    assert message.endswith("docs/add-an-architecture.md says how to add one")


@pytest.mark.parametrize(
    "model_type, said",
    [
        ("axk2", "'deepseek', but this one's blocks have input_layernorm.mlp.fc1"),
        ("arcee", "'nemotron', and their blocks have the same parts"),
        ("diffllama", "but its declaration says nothing of self_attn.lambda_k1"),
        ("granite_swa", "'granite', but its declaration says nothing of self_attn.sinks"),
        ("cwm", "'llama', and their blocks have the same parts"),
        ("mamba2", "its blocks have no part in common"),
        ("t5", "nor is it a decoder of blocks"),
        ("dbrx", "transformers lays out none from this configuration"),
    ],
)
def test_the_nearest_family_is_named_and_what_is_not_as_it_assumes(model_type, said):
    assert said in refused(AutoConfig.for_model(model_type))


def test_a_depth_that_nothing_has_is_refused_before_anything_is_laid_out():
    assert "num_hidden_layers 1000000000" in refused(
        AutoConfig.for_model("jetmoe", num_hidden_layers=10**9)
    )


def test_a_setting_that_is_not_as_assumed_is_named(tiny_configs):
    config = copy.deepcopy(tiny_configs["llama"])
    config.rope_parameters["partial_rotary_factor"] = 0.5
    said = "config.json says partial_rotary_factor 0.5, and its declaration holds for 1.0 alone"
    assert said in refused(config)
    mixed = copy.deepcopy(tiny_configs["gemma3"])
    mixed.rope_parameters["full_attention"]["partial_rotary_factor"] = 0.25
    assert "partial_rotary_factor 0.25" in refused(mixed)


def test_a_declared_refusal_is_an_error(monkeypatch):
    refusing = Architecture(
        "odd", ("odd",), "x", lambda c, block: (), lambda c, block: (), refusal=lambda c: "too odd"
    )
    monkeypatch.setattr(lrquant.architectures, "architectures", lambda: {"odd": refusing})
    config = GPT2Config()
    config.model_type = "odd"
    with pytest.raises(LRQuantError, match="model family 'odd': too odd"):
        architecture_of(config)
