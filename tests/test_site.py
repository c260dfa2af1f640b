"""The documentation site, without building it: its pages, and what is generated into them."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import lrquant
from lrquant.architectures import architectures, towers
from lrquant.config.config import Config
from lrquant.config.core import TARGETS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


@pytest.fixture
def part(monkeypatch):
    """A module of the site's generated parts, by its name."""
    monkeypatch.syspath_prepend(str(DOCS / "site"))
    return lambda name: importlib.import_module(f"site_parts.{name}")


def pages_in(nav: list | dict | str) -> list[str]:
    """The pages that a navigation names, in their order."""
    if isinstance(nav, str):
        return [nav]
    entries = nav.values() if isinstance(nav, dict) else nav
    return [page for entry in entries for page in pages_in(entry)]


def settings_of_site() -> dict:
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def sources(pages: ModuleType) -> dict[str, Path]:
    """Where each page of the site comes from."""
    named = pages_in(settings_of_site()["nav"])
    return {page: ROOT / pages.source_of(page) for page in named}


def test_every_page_stands_in_the_navigation_once(part):
    named = pages_in(settings_of_site()["nav"])
    there = [path.relative_to(DOCS).as_posix() for path in DOCS.glob("*.md")]
    assert sorted(named) == sorted([*there, *part("pages").ELSEWHERE]), "name it in mkdocs.yml"
    assert {page: path for page, path in sources(part("pages")).items() if not path.is_file()} == {}


def test_files_that_the_site_is_made_with_exist():
    settings = settings_of_site()
    assert settings["strict"], "else a dead link is no error"
    named = [ROOT / hook for hook in settings["hooks"]]
    named += [DOCS / style for style in settings["extra_css"]]
    assert [path for path in named if not path.is_file()] == []


def test_every_generated_part_is_made_and_shown(part):
    texts = [path.read_text(encoding="utf-8") for path in sources(part("pages")).values()]
    shown = [name for text in texts for name in part("pages").parts_of(text)]
    assert sorted(shown) == sorted(part("parts").PARTS)


def test_commands_and_settings_are_all_there(part):
    commands = part("commands").markdown()
    for name in ("quantize", "check", "evaluate", "export", "report", "compare", "inspect"):
        assert f"## lrquant {name}\n" in commands
    for flag in ("model", "scheme", "resume", "let-sites", "tune-rounding", "max-drop", "format"):
        assert f"`--{flag}" in commands
    settings = part("settings").markdown()
    assert [e.name for e in dataclasses.fields(Config) if f"| `{e.name}` |" not in settings] == []
    assert "| `keep_best` |" in part("settings").presets_markdown()


def test_public_names_have_a_signature_and_a_docstring(part):
    text = part("api").markdown()
    names = [name for name in lrquant.__all__ if not name.startswith("__")]
    assert [name for name in names if f"## lrquant.{name}\n" not in text] == []
    assert "scheme: str | Scheme | None = None," in text
    assert "Raises LRQuantError for anything the caller can mend." in text
    assert "activation_symmetric: bool = False," in text


def test_families_and_runtimes_have_a_row_each(part):
    families = part("families").markdown()
    assert [kind for kind in architectures() if f"| `{kind}` |" not in families] == []
    assert [
        kind for kind in towers() if f"| `{kind}` |" not in part("families").towers_markdown()
    ] == []
    opt = next(line for line in families.splitlines() if line.startswith("| `opt` |"))
    assert opt.count("yes") == 4
    head, _, *rows = part("runtimes").markdown().splitlines()
    assert all(f"`{target}`" in head for target in TARGETS)
    assert any(row.startswith("| `W4A4` | `lrquant` |") and row.endswith("yes |") for row in rows)


def test_links_lead_to_pages_of_the_site_or_become_words(part):
    relinked = part("pages").relinked
    assert relinked("[m](../benchmarks/README.md#memory)", "a.md") == "[m](measurements.md#memory)"
    assert relinked("[n](../docs/numerics.md#x)", "measurements.md") == "[n](numerics.md#x)"
    assert relinked("![f](figures/block.svg)", "a.md") == "![f](figures/block.svg)"
    assert relinked("[e](../examples/demo.py) [w](https://a.b/c)", "a.md") == "e [w](https://a.b/c)"
    assert relinked("```\n[e](../x.py)\n```", "a.md") == "```\n[e](../x.py)\n```"
    assert relinked("[two\nlines](../CONTRIBUTING.md)", "a.md") == "[two\nlines](contributing.md)"


def test_figures_are_whole_and_fetch_nothing():
    figures = sorted((DOCS / "figures").glob("*.svg"))
    text = "".join(path.read_text(encoding="utf-8") for path in DOCS.glob("*.md"))
    assert figures and [path.name for path in figures if f"figures/{path.name}" not in text] == []
    for path in figures:
        drawing = path.read_text(encoding="utf-8")
        assert drawing.startswith("<svg ") and "<title>" in drawing and "<desc>" in drawing
        assert "href" not in drawing and "@import" not in drawing


def template(node: ast.AST) -> str | None:
    """A string of the source with `…` for what is put into it."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else "…"
    if isinstance(node, ast.JoinedStr):
        return "".join(template(value) or "…" for value in node.values)
    return None


def said_by_the_package() -> str:
    """Every string of the package, one a line."""
    paths = Path(lrquant.__file__).parent.rglob("*.py")
    nodes = (n for path in paths for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    return "\n".join(text for text in map(template, nodes) if text)


def quoted_errors(page: str) -> list[str]:
    """The lines that a page says the package says: the first cells of its tables of them."""
    tables = re.findall(r"^\| it says \| mend \|\n\| --- \| --- \|\n((?:\|.*\n)+)", page, re.M)
    return re.findall(r"^\| `([^`]+)` \|", "".join(tables), re.M)


def test_errors_of_the_troubleshooting_page_are_those_of_the_package():
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    lines, said = quoted_errors(page), said_by_the_package()
    assert len(lines) > 30
    pieces = [
        piece.strip() for line in [*lines, "no line of the package"] for piece in line.split("…")
    ]
    assert [piece for piece in pieces if piece not in said] == ["no line of the package"]


def test_flags_that_other_tools_are_translated_to_exist(part):
    page = (DOCS / "migrating.md").read_text(encoding="utf-8")
    known = set(re.findall(r"--[a-z-]+", part("commands").markdown()))
    cells = re.findall(r"^\|.*[^\\]\| ([^|]+) \|$", page, re.M)
    typed = {flag for cell in cells for flag in re.findall(r"--[a-z-]+", cell.replace("_", "-"))}
    assert len(typed) > 30
    assert typed - known == set()
