"""The families that are served: a file each, by transformers' model types; others are refused."""

from __future__ import annotations

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
        used = [name for name in families if re.search(pattern, sources[name])]
        assert used, f"{helper}.py declares no ARCHITECTURE and no family imports it"


@pytest.mark.parametrize("model_type", sorted(set(architectures()) - {"mllama"}))
def test_model_types_are_those_of_transformers(model_type):
    architecture = architectures()[model_type]
    assert model_type in architecture.model_types
    assert architecture_of(AutoConfig.for_model(model_type)) is architecture


def test_an_unknown_family_is_refused_with_the_known_and_the_guide():
    with pytest.raises(LRQuantError) as caught:
        architecture_of(GPT2Config())
    message = str(caught.value)
    assert message.startswith("model family 'gpt2' is not declared; known: ")
    assert ", ".join(sorted(architectures())) in message
    assert "docs/add-an-architecture.md" in message


def test_a_declared_refusal_is_an_error(monkeypatch):
    refusing = Architecture(
        "odd", ("odd",), "x", lambda c, block: (), lambda c, block: (), refusal=lambda c: "too odd"
    )
    monkeypatch.setattr(lrquant.architectures, "architectures", lambda: {"odd": refusing})
    config = GPT2Config()
    config.model_type = "odd"
    with pytest.raises(LRQuantError, match="model family 'odd': too odd"):
        architecture_of(config)
