"""The package's names come when they are asked for, and nothing heavy before it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import lrquant

SOURCE = Path(lrquant.__file__).parent
HEAVY = {"torch", "transformers", "numpy", "datasets", "compressed_tensors", "matplotlib"}
HEAVY |= {"psutil", "rich"}
CONFIG = [f"lrquant.config.{path.stem}" for path in sorted((SOURCE / "config").glob("*.py"))]


def heavy_after(program: str) -> set[str]:
    """The heavy libraries that a program of its own process has imported when it ends."""
    told = "import atexit, sys\natexit.register(lambda: print(sorted(sys.modules)))\n"
    ended = subprocess.run(
        [sys.executable, "-c", told + program],
        **{"capture_output": True, "text": True, "cwd": SOURCE.parent, "check": True},
    )
    return HEAVY & set(ast.literal_eval(ended.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "program",
    [
        "import lrquant",
        "from lrquant import Config, Scheme, LRQuantError; Config(model='m').resolved()",
        f"import {', '.join(CONFIG)}",
        "import lrquant.cli, lrquant.cli.commands",
        *(
            f"from lrquant.cli import main; main({words})"
            for words in (
                *(["--version"], ["--help"], ["quantize", "--help"], ["quantize", "--help-all"]),
                ["stats", "-h"],
            )
        ),
    ],
)
def test_nothing_heavy_is_imported(program):
    assert heavy_after(program) == set()


@pytest.mark.parametrize(
    "words",
    [
        *(
            ["list", kind]
            for kind in ("models", "schemes", "formats", "targets", "recipes", "tasks")
        ),
        ["guide"],
        ["quantize", "--shceme", "W4A16"],
    ],
    ids=" ".join,
)
def test_what_only_says_something_imports_nothing_that_computes(words):
    assert heavy_after(f"from lrquant.cli import main; main({words})") <= {"rich"}


def test_what_is_imported_is_seen():
    assert heavy_after("import lrquant, psutil") == {"psutil"}


def test_the_names_that_type_checkers_read_are_those_that_come():
    """They are written twice: as imports, and as modules to look into when they are asked for."""
    body = ast.parse((SOURCE / "__init__.py").read_text()).body
    (branch,) = (node for node in body if isinstance(node, ast.If))
    imports = [node for node in branch.body if isinstance(node, ast.ImportFrom)]
    modules = {name.name: str(node.module) for node in imports for name in node.names}
    assert {*modules, "__version__"} == set(lrquant.__all__) <= set(dir(lrquant))
    for name, module in modules.items():
        assert getattr(lrquant, name) is getattr(import_module(module), name)


def test_a_name_that_is_none():
    with pytest.raises(AttributeError, match="module 'lrquant' has no attribute 'quantise'"):
        lrquant.quantise  # noqa: B018
    with pytest.raises(ImportError, match="quantise"):
        from lrquant import quantise  # noqa: F401
