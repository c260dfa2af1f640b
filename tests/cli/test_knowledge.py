"""What there is, the guide, completion: said without computing, and true."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lrquant.architectures import architectures
from lrquant.cli import main
from lrquant.cli.completion import SHELLS, completion_script
from lrquant.cli.listing import KINDS, listed
from lrquant.cli.parsing import parsers
from lrquant.config.core import PRESETS, TARGETS
from lrquant.config.scheme import USUAL, Scheme
from lrquant.config.schemes import Schemes
from lrquant.formats.choice import formats
from lrquant.formats.targets import loading_refusal
from lrquant.measures.harness.comparison import PUBLISHED_TASKS

GUIDE = Path(__file__).parents[2] / "docs" / "guide.md"


def said(capsys, *words) -> str:
    assert main(list(words)) == 0
    return capsys.readouterr().out


def test_the_lists_are_whole():
    own = {k for k, f in architectures().items() if f.model_types and "outside" not in f.name}
    models = listed("models")
    assert [kind for kind in own if kind not in models] == []
    assert [name for name in formats() if name not in listed("formats")] == []
    assert [name for name in USUAL if f"{name} " not in listed("schemes")] == []
    assert [Scheme.parse(name).name for name in USUAL] == list(USUAL)
    assert [line.split()[0] for line in listed("targets").splitlines()] == list(TARGETS)
    assert [line.split()[0] for line in listed("recipes").splitlines()] == list(PRESETS)
    assert ", ".join(PUBLISHED_TASKS) in listed("tasks")


@pytest.mark.parametrize("columns", [60, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_a_list_fits(kind, columns):
    assert all(len(line) <= columns for line in listed(kind, None, columns).splitlines())


def test_a_list_that_is_none(capsys):
    assert main(["list", "model"]) == 2
    assert "use one of models, schemes" in capsys.readouterr().err
    assert "the nearest is models" in said_error(capsys, "list", "modells")


def said_error(capsys, *words) -> str:
    assert main(list(words)) == 2
    return capsys.readouterr().err


def test_the_guide_is_the_page(capsys):
    assert said(capsys, "guide").rstrip() == GUIDE.read_text(encoding="utf-8").rstrip()


def test_the_guide_names_schemes_that_are_some():
    words = GUIDE.read_text(encoding="utf-8").replace("`", " ").replace("|", " ").split()
    schemes = [word for word in words if re.match(r"W\d+A\d", word)]
    assert len(schemes) > 10
    for word in schemes:
        Scheme.parse(word.strip(",:;"))


@pytest.mark.parametrize(
    ("scheme", "symmetric", "runtimes"),
    [
        ("W4A16g128", False, "vllm vllm-cpu transformers"),
        ("W4A16", False, "vllm vllm-cpu transformers"),
        ("W4A16g96", False, "vllm vllm-cpu transformers"),
        ("W8A16-sym", False, "vllm transformers"),
        ("W3A16g64-sym", False, "vllm transformers"),
        ("W7A16-sym", False, "vllm transformers"),
        ("W2A16g64", False, "transformers"),
        ("W8A8-sym-qkv16", True, "vllm vllm-cpu transformers"),
        ("W4A8-sym-qkv16", True, "vllm transformers"),
        ("W4A4-sym-qkv16", True, "vllm transformers"),
        ("W8A8-sym-qkv16", False, ""),
        ("W4A4", False, ""),
    ],
)
def test_the_guide_s_table_of_runtimes_is_what_formats_say(scheme, symmetric, runtimes):
    """Each row of "By hardware and runtime", in its order; no runtime: the native format alone."""
    own = Scheme.parse(scheme)
    schemes = Schemes(dataclasses.replace(own, activation_symmetric=symmetric))
    form = formats()["compressed-tensors"]
    loaded = [t for t in ("vllm", "vllm-cpu", "transformers") if _loads(form, schemes, t)]
    assert " ".join(loaded) == runtimes


def _loads(form, schemes, target) -> bool:
    refused = form.schemes_refusal(schemes)
    return refused is None and loading_refusal(form, schemes, target) is None


@pytest.mark.parametrize("shell", SHELLS)
def test_completion(shell):
    pytest.importorskip("shtab")
    script = completion_script(shell, *parsers(every=True))
    for word in ("quantize", "recipe", "balanced", "help-all"):
        assert word in script


def test_bash_reads_the_script():
    pytest.importorskip("shtab")
    script = completion_script("bash", *parsers(every=True))
    asked = (
        "COMP_WORDS=(lrquant quan); COMP_CWORD=1; _shtab_lrquant 2>/dev/null; echo ${COMPREPLY[@]}"
    )
    ended = subprocess.run(
        ["bash", "-c", f"{script}\n{asked}"], capture_output=True, text=True, check=False
    )
    assert ended.stdout.strip() == "quantize", ended.stderr


def test_completion_without_its_library(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert "pip install shtab" in said_error(capsys, "completion", "bash")
    assert "use one of bash" in said_error(capsys, "completion", "sh")
