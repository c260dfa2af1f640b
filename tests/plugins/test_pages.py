"""What the pages show: files as they are, code that runs, commands that parse, links that lead."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import lrquant
from lrquant import export
from lrquant.architectures import architectures
from lrquant.cli.parsing import parsed
from lrquant.errors import LRQuantError

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "lrquant"
FILES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks/README.md")
PAGES = pytest.mark.parametrize("page", [str(path.relative_to(ROOT)) for path in FILES])
PUBLISHED = {
    "python main.py": "lrquant quantize --published-statistics",
    "python generate_act_scale_shift.py": "lrquant stats",
}
SMALL = {"nsamples": 2, "seqlen": 16, "epochs": 1, "precision": "float32", "output_dir": "run"}
PARSING = """
import sys
from lrquant.cli.parsing import parsed
for line in sys.stdin.read().splitlines():
    parsed(line.split("\\t"))
"""


@dataclass(frozen=True)
class Fenced:
    """A fenced block: its language, its text, and the paragraph before it."""

    language: str
    text: str
    before: str

    @property
    def whole_file(self) -> str | None:
        """The file that it is all of, as the paragraph before names it."""
        named = re.search(r"all of\s+(?:an? [^`]*)?`([\w/]+\.py)`", self.before)
        return named.group(1) if named else None


def fenced_of(page: str) -> list[Fenced]:
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M)
    return [
        Fenced(block[1], block[2], text[: block.start()].rstrip().rpartition("\n\n")[2])
        for block in blocks
    ]


def python_of(page: str) -> list[Fenced]:
    return [block for block in fenced_of(page) if block.language == "python"]


def prose_of(page: str) -> str:
    """A page without its fenced blocks."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)


def code_of(block: Fenced) -> str:
    """What Python reads: entries of a mapping get their braces."""
    if block.text.startswith(" "):
        return "{" + textwrap.dedent(block.text) + "}"
    return block.text


def in_package(name: str) -> list[Path]:
    """The files of the package that a page calls so: by path, or by their last part."""
    if "/" in name:
        return [ROOT / name] if (ROOT / name).is_file() else []
    return [path for path in PACKAGE.rglob(name) if path.name == name]


def shown_files(page: str) -> Iterator[tuple[Fenced, Path]]:
    for block in python_of(page):
        for path in in_package(block.whole_file or "none"):
            yield block, path


def is_verbatim(block: Fenced, paths: list[Path]) -> bool:
    return any(block.text in path.read_text(encoding="utf-8") for path in paths)


@PAGES
def test_a_file_that_is_shown_whole_is_as_shown(page):
    for block, path in shown_files(page):
        assert block.text == path.read_text(encoding="utf-8"), f"{page}: {path.name}"


def test_files_are_shown_whole():
    """Else the test above compares nothing."""
    shown = [path.name for _, path in shown_files("docs/add-an-architecture.md")]
    assert shown == ["qwen2.py", "lfm2.py", "ernie4_5_moe.py"]


@PAGES
def test_a_declaration_that_is_shown_stands_in_the_package(page):
    declared = [b for b in python_of(page) if re.match(r"(ARCHITECTURE|FORMAT) = ", b.text)]
    paths = list(PACKAGE.rglob("*.py"))
    assert all(is_verbatim(block, paths) for block in declared)
    if declared:
        changed = Fenced("python", declared[0].text.replace("name=", "names="), "")
        assert not is_verbatim(changed, paths), "a comparison that sees nothing"


def leads(module: str, name: str) -> bool:
    """Whether `from module import name` does not fail."""
    if hasattr(importlib.import_module(module), name):
        return True
    return importlib.util.find_spec(f"{module}.{name}") is not None


@PAGES
def test_python_compiles_and_its_imports_lead_somewhere(page):
    for block in python_of(page):
        for node in ast.walk(ast.parse(code_of(block))):
            if isinstance(node, ast.ImportFrom):
                lost = [each.name for each in node.names if not leads(str(node.module), each.name)]
                assert lost == [], node.module
            elif isinstance(node, ast.Import):
                for each in node.names:
                    importlib.import_module(each.name)


def test_the_worked_family_declares_what_it_says():
    """Tern is laid out like Qwen3: a head size of its own, and norms on q and k."""
    page = "docs/add-an-architecture.md"
    (block,) = [b for b in python_of(page) if (b.whole_file or "").endswith("tern.py")]
    names: dict = {}
    exec(compile(block.text, "tern.py", "exec"), names)
    tern, like = names["ARCHITECTURE"], architectures()["qwen3"]
    from transformers import Qwen3Config

    config = Qwen3Config(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    assert tern.matrices(config, 0) == like.matrices(config, 0)
    assert tern.sites(config, 0) == like.sites(config, 0)
    assert tern.sites(config, 0) != architectures()["qwen2"].sites(config, 0)


def test_entries_of_the_tests_are_as_shown():
    entries = [b.text for b in python_of("docs/add-an-architecture.md") if b.text.startswith(" ")]
    tests = [ROOT / "tests/conftest.py", ROOT / "tests/architectures/test_contract.py"]
    text = "".join(path.read_text(encoding="utf-8") for path in tests)
    own = [entry.replace("tern", "qwen3").replace("Tern", "Qwen3") for entry in entries]
    assert len(own) == 7 and all(entry in text for entry in own)


def test_the_code_of_the_readme_and_of_the_native_format_runs(
    model_folder, data_dir, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    quantize, folder = lrquant.quantize, str(model_folder("llama"))

    def small(model, **settings):
        assert model == "path/to/model"
        return quantize(folder, **{**settings, **SMALL, "data_dir": data_dir})

    monkeypatch.setattr(lrquant, "quantize", small)
    (learn,) = (block.text for block in python_of("README.md"))
    (load,) = (block.text for block in python_of("docs/formats.md") if "registers" in block.text)
    names: dict = {"inputs": {"input_ids": torch.arange(3, 9)[None]}}
    exec(compile(learn, "README.md", "exec"), names)
    assert names["run"].results["perplexity"]["wikitext2"]
    export("run", "w4a4-native", format="lrquant")
    exec(compile(load, "docs/formats.md", "exec"), names)
    assert names["model"].dtype == torch.float32


@PAGES
def test_entry_points_are_read_and_name_what_the_page_declares(page):
    for block in fenced_of(page):
        if block.language == "toml":
            groups = tomllib.loads(block.text)["project"]["entry-points"]
            (group,) = groups.values()
            code = [b.text for b in python_of(page) if "toy_" in (b.whole_file or "")]
            for module, _, name in (value.partition(":") for value in group.values()):
                assert f"`{module}.py`" in prose_of(page)
                assert any(re.search(rf"^(class )?{name}\b", text, re.M) for text in code)


def joined_lines(text: str) -> list[str]:
    return re.sub(r"\\\n\s*", " ", text).splitlines()


def commands_of(page: str) -> list[list[str]]:
    """The words of every command of a fenced or indented block, after `lrquant`."""
    fenced = [line for b in fenced_of(page) if not b.language for line in joined_lines(b.text)]
    indented = [line.strip() for line in joined_lines(prose_of(page)) if line.startswith("    ")]
    lines = [line.removeprefix("$ ") for line in (*fenced, *indented)]
    for published, own in PUBLISHED.items():
        lines = [line.replace(published, own) for line in lines]
    return [words_of(line) for line in lines if line.startswith("lrquant ")]


def mentions_of(page: str) -> list[list[str]]:
    """The words of every command that stands in the text, positional ones perhaps left out."""
    spans = re.findall(r"`(?:\$ )?(lrquant [a-z][^`]*)`", prose_of(page))
    return [words_of(span) for span in spans]


def words_of(line: str) -> list[str]:
    return [word for word in shlex.split(line, comments=True)[1:] if word != "…"]


def completed(words: list[str]) -> list[str]:
    """The words with one for each positional argument that is missing."""
    for _ in range(3):
        try:
            parsed(words)
        except LRQuantError as error:
            if "are required" not in str(error):
                raise
            words = [*words, "X"]
    return words


@PAGES
def test_commands_parse(page, installed):
    if any(block.language == "toml" for block in fenced_of(page)):
        parse_with_the_package_of(page, installed)
        return
    for words in commands_of(page):
        parsed(words)
    for words in mentions_of(page):
        parsed(completed(words))


def parse_with_the_package_of(page: str, installed) -> None:
    """In a process of its own: settings come with the package."""
    paths = os.pathsep.join([str(installed(Path(page).name)), str(PACKAGE.parent)])
    lines = "\n".join("\t".join(words) for words in commands_of(page))
    subprocess.run(
        [sys.executable, "-c", PARSING],
        env={**os.environ, "PYTHONPATH": paths},
        input=lines,
        text=True,
        check=True,
    )


def test_a_flag_that_is_none_is_seen():
    assert sum(len(commands_of(str(path.relative_to(ROOT)))) for path in FILES) > 30
    with pytest.raises(LRQuantError, match="--scheem"):
        parsed(["quantize", "--model", "m", "--scheem", "W4A4"])
    with pytest.raises(LRQuantError, match="--scheem"):
        completed(["evaluate", "--scheem", "W4A4"])


def slug(heading: str) -> str:
    """The anchor that a heading gets on the pages of a repository."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors_of(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", prose_of(str(path.relative_to(ROOT))), re.M)
    return {slug(heading) for heading in headings}


@PAGES
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if not target.startswith("http"):
            name, _, anchor = target.partition("#")
            path = (ROOT / page).parent / name if name else ROOT / page
            assert path.exists(), target
            assert not anchor or anchor in anchors_of(path.resolve()), target


@PAGES
def test_files_that_are_named_exist(page):
    made = {block.whole_file for block in python_of(page)}
    paths = re.findall(r"`((?:src|tests|docs|examples|benchmarks)/[\w./-]+)`", prose_of(page))
    assert [p for p in paths if p not in made and not (ROOT / p).exists()] == []
    names = set(re.findall(r"`(?:lrquant/)?([\w/]+\.py)`", prose_of(page))) - made
    known = [path.as_posix() for path in ROOT.rglob("*.py")]
    assert [n for n in names if not any(path.endswith(f"/{n}") for path in known)] == []
