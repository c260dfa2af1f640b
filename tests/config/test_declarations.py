"""Declarations of other packages: found by their entry points, refused where they are none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import lrquant
from lrquant.config.declarations import declarations
from lrquant.errors import LRQuantError
from lrquant.formats.format import Format

CODE = """
from lrquant.formats.format import Format
FORMAT = Format("toy", lambda *a: None, lambda *a: {}, lambda *a: None)
OTHER = "no format"
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """package(object) -> another package, installed, that declares it as a format."""

    def install(value: str) -> None:
        (tmp_path / "toy_format.py").write_text(CODE)
        info = tmp_path / "toy-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[lrquant.formats]\ntoy = {value}\n")
        monkeypatch.syspath_prepend(str(tmp_path))

    yield install
    sys.modules.pop("toy_format", None)


def names() -> list[str]:
    return [form.name for form in declarations("formats", "lrquant.formats", "FORMAT", Format)]


def test_a_declaration_of_another_package_stands_after_our_own(package):
    own = names()
    assert "toy" not in own
    package("toy_format:FORMAT")
    assert names() == [*own, "toy"]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("toy_format:OTHER", "toy_format:OTHER is a str, not a Format"),
        ("toy_format:MISSING", "cannot be loaded"),
        ("toy_absent:FORMAT", "cannot be loaded .*mend or uninstall the package"),
    ],
)
def test_what_is_no_declaration_is_refused_by_its_name(package, value, said):
    package(value)
    with pytest.raises(LRQuantError, match=f"'toy' of lrquant.formats: .*{said.split(':')[-1]}"):
        names()


SETTINGS = """
from dataclasses import dataclass
from lrquant.config.declarations import Declaration
from lrquant.config.settings import setting
@dataclass(frozen=True)
class Brought:
    seqlen: int = setting(7, "another default than that of the core")
class Toy(Declaration):
    settings = Brought
TOY = Toy()
"""


def test_a_setting_of_two_defaults_is_refused_by_its_name(tmp_path):
    """In a process of its own: settings come with the package."""
    (tmp_path / "toy_settings.py").write_text(SETTINGS)
    info = tmp_path / "toy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lrquant.measures]\ntoy = toy_settings:TOY\n")
    paths = os.pathsep.join([str(tmp_path), str(Path(lrquant.__file__).parents[1])])
    process = subprocess.run(
        [sys.executable, "-m", "lrquant", "quantize", "--help"],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 2 and "Traceback" not in process.stderr
    assert "setting seqlen of toy_settings: its default 7 is not that" in process.stderr
