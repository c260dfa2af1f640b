"""`lrquant families`: a row a model type, with its sites, and what is refused in its usual form."""

from __future__ import annotations

from lrquant.architectures import architectures
from lrquant.cli import main
from lrquant.reports.families import marks


def test_every_model_type_has_a_row(capsys):
    assert main(["families"]) == 0
    lines = capsys.readouterr().out.splitlines()
    _, _, *rows = (line.split("|")[1].strip() for line in lines if line.startswith("| "))
    assert rows == sorted(architectures())
    assert any(line.startswith("mllama: every fifth block") for line in lines)


def test_marks_are_of_all_blocks():
    families = architectures()
    assert marks(families["llama"], "llama") == ["yes"] * 4
    assert marks(families["qwen3_5_text"], "qwen3_5_text") == ["yes", "some blocks", "–", "yes"]
    assert marks(families["mllama"], "mllama") == ["refused"] * 4
