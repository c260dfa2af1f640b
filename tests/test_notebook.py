"""The notebook of examples/: its cells run one after the other, offline, as a reader runs them."""

from __future__ import annotations

import ast
import json
from pathlib import Path

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"


def cells() -> list[str]:
    """The code of each cell."""
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return ["".join(each["source"]) for each in content["cells"] if each["cell_type"] == "code"]


def shown_by(code: str, names: dict[str, object]) -> object:
    """What a cell shows: the value of its last line, if that has one."""
    tree = ast.parse(code)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, NOTEBOOK.name, "exec"), names)
    if not isinstance(last, ast.Expr):
        return None
    return eval(compile(ast.Expression(last.value), NOTEBOOK.name, "eval"), names)


def test_cells_run_in_their_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    _, loss, checked, run, perplexity, answer, loaded, facts, page = [
        shown_by(code, names) for code in cells()
    ]
    assert loss < 1 and checked.passed
    assert "<table>" in run._repr_html_() and "sums.txt" in repr(run)
    scores = perplexity["sums.txt"]
    assert scores["quantized"] < scores["round_to_nearest"]
    assert loaded.endswith(answer) and "verified: hashes" in facts
    assert page.is_file() and sorted(path.name for path in tmp_path.iterdir()) == [
        *("run", "sums.txt", "tiny-sums", "tiny-sums-w2")
    ]


def test_it_is_saved_without_outputs():
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    code = [each for each in content["cells"] if each["cell_type"] == "code"]
    assert all(each["outputs"] == [] and each["execution_count"] is None for each in code)
