"""The rooms of the house: what a file may import and name, and that every file is in a room."""

from __future__ import annotations

import ast
from pathlib import Path

import lrquant

ROOT = Path(lrquant.__file__).parent
ROOMS = (  # from the ground up: a room imports nothing that stands after it
    *(
        "config",
        "files",
        "team",
        "numerics",
        "architectures",
        "model",
        "data",
        "runs",
        "ingredients",
    ),
    *("blocks", "learn", "measures", "runtime", "formats", "preflight", "reports"),
)
GROUND = ("errors", "version")  # which every room may import
ENTRANCE = ("__init__", "__main__", "api", "cli", "pipeline")
WITH_CONFIG = (  # which may take a whole `Config`: entrances, and what keeps or repeats a run
    *("config", "cli", "api", "__init__", "pipeline", "runs.folder", "reports.repeat"),
    *("preflight.checks", "preflight.prospect", "preflight.findings"),
    *("measures.evaluation.evaluation", "measures.evaluation.resolution"),
    *("measures.evaluation.telling", "measures.subjects"),
)


def imports_of(path: Path) -> set[str]:
    """Names of this package's modules that a file imports, wherever in it, without the package."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lrquant."):
            modules.add(str(node.module).removeprefix("lrquant."))
        elif isinstance(node, ast.ImportFrom) and node.module == "lrquant":
            modules |= {name.name for name in node.names}
        elif isinstance(node, ast.Import):
            names = [name.name for name in node.names]
            modules |= {n.removeprefix("lrquant.") for n in names if n.startswith("lrquant.")}
    return modules


def names_config(source: str) -> bool:
    """Whether a file names the class of all settings: imports it, or says it of an argument."""
    tree = list(ast.walk(ast.parse(source)))
    names = {node.id for node in tree if isinstance(node, ast.Name)}
    names |= {node.attr for node in tree if isinstance(node, ast.Attribute)}
    names |= {each.name for n in tree if isinstance(n, ast.ImportFrom) for each in n.names}
    quoted = {node.value for node in tree if isinstance(node, ast.Constant)}
    return bool({"Config", "_Config"} & (names | quoted))


def is_in(module: str, place: str) -> bool:
    return f"{module}.".startswith(f"{place}.")


def room_of(module: str) -> str:
    return module.partition(".")[0]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def upward(module: str, imported: set[str]) -> list[str]:
    """What a module imports of rooms above its own, or of the entrance."""
    room = room_of(module)
    if room in ENTRANCE:
        return []
    allowed = {*GROUND, *ROOMS[: ROOMS.index(room) + 1]} if room in ROOMS else set(GROUND)
    return sorted(other for other in imported if room_of(other) not in allowed)


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import themselves by way of others."""
    known = {name: set(others) & graph.keys() for name, others in graph.items()}

    def reached(name: str) -> set[str]:
        seen: set[str] = set()
        ahead = set(known[name])
        while ahead:
            seen |= ahead
            ahead = {other for each in ahead for other in known[each]} - seen
        return seen

    return sorted(name for name in known if name in reached(name))


FILES = {module_of(path): imports_of(path) for path in sorted(ROOT.rglob("*.py"))}


def test_an_import_goes_only_downwards():
    arrows = {module: upward(module, imported) for module, imported in FILES.items()}
    assert {module: up for module, up in arrows.items() if up} == {}


def test_no_import_circle():
    assert circles(FILES) == []


def test_settings_stop_at_the_entrances():
    """A room is given values, or a group of them, by name."""
    naming = {module_of(path) for path in ROOT.rglob("*.py") if names_config(path.read_text())}
    assert [m for m in sorted(naming) if not any(is_in(m, place) for place in WITH_CONFIG)] == []
    assert [place for place in WITH_CONFIG if not any(is_in(m, place) for m in naming)] == []


def test_every_file_is_in_a_room():
    assert {room_of(m) for m in FILES} <= {*ROOMS, *GROUND, *ENTRANCE}
    assert {path.name for path in ROOT.iterdir() if path.is_dir()} - {"__pycache__"} == {
        *ROOMS,
        "api",
        "cli",
    }


def test_the_map_names_every_room():
    contributing = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    assert [room for room in ROOMS if f"`{room}/`" not in contributing] == []


def test_an_arrow_that_runs_up_and_a_circle_are_seen():
    assert upward("numerics.weights", {"learn.fit", "config.scheme"}) == ["learn.fit"]
    assert upward("learn.fit", {"pipeline"}) == ["pipeline"]
    assert circles({"a": {"b"}, "b": {"a"}, "c": {"a"}}) == ["a", "b"]


def test_a_room_that_names_all_settings_is_seen():
    assert names_config("def read(config: Config) -> None: ...")
    assert names_config("def read(config: 'Config') -> None: ...")
    assert names_config("from lrquant.config.config import Config as Settings")
    assert not names_config("from transformers import PretrainedConfig")
    assert is_in("measures.subjects.subject", "measures.subjects")
    assert not is_in("measures.tasks", "measures.subjects")
