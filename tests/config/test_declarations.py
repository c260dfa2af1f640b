"""Declarations of other packages: found by their entry points, refused where they are none."""

from __future__ import annotations

import sys

import pytest

from lrquant.config.declarations import declarations
from lrquant.errors import LRQuantError
from lrquant.export.format import Format

CODE = """
from lrquant.export.format import Format
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
        monkeypatch.delitem(sys.modules, "toy_format", raising=False)

    return install


def names() -> list[str]:
    return [form.name for form in declarations("formats", "lrquant.export", "FORMAT", Format)]


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
