"""Contents of what a comparison is of: runs, checkpoints, models and folders of results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lrquant.errors import LRQuantError, nearest_beside
from lrquant.files.manifest import MANIFEST, read_manifest
from lrquant.files.whole import JsonObject, read_json
from lrquant.formats.verification import verify
from lrquant.model.sources.resolve import resolve_model
from lrquant.reports.contents import run_contents, without_non_finite
from lrquant.reports.values import Contents
from lrquant.runs.folder import RunFolder, is_run
from lrquant.runs.results import VERDICT, kinds
from lrquant.version import __version__

_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")


def compared_contents(target: str) -> Contents:
    """Contents of a run, a checkpoint, a folder of results, or a model as for `--model`.

    Of what is no run they have results as far as there are any, sizes and facts, and no blocks.
    """
    path = Path(target)
    if is_run(path):
        return run_contents(RunFolder.open(path))
    if (path / MANIFEST).is_file():
        return _checkpoint(path)
    if (path / "results.json").is_file():
        return _results(path)
    if path.is_dir() and not _is_model(path):
        RunFolder.open(path)  # says that there is none
    return _model(target)


def with_known_weights(contents: Sequence[Contents]) -> Sequence[Contents]:
    """The same; what does not know the hash of its model's weights has that of its namesake."""
    hashes = {_short(each): each["run"]["weights"] for each in contents if each["run"]["weights"]}
    for each in contents:
        each["run"]["weights"] = each["run"]["weights"] or hashes.get(_short(each), "")
    return contents


def _short(contents: Contents) -> str:
    return Path(str(contents["run"]["model"])).name


def _is_model(path: Path) -> bool:
    return (path / "config.json").is_file() or any(path.glob("*.gguf"))


def _checkpoint(path: Path) -> Contents:
    facts = read_manifest(path)
    results = facts["results"]
    verified = verify(path)
    if verified.problems:
        raise LRQuantError(f"{path}: {verified.problems[0]}; export the run again")
    size = {"bytes": _folder_bytes(path), "bits_per_weight": verified.bits_per_weight}
    told = [
        ("What", f"checkpoint, {facts['format']}"),
        ("Scheme", facts["scheme"]),
        ("Vision tower", facts.get("tower", "")),
        ("Method", facts["method"]),
        ("Calibration", facts["calibration"]["text"]),
        ("Precision", f"{facts['precision']} matrix products"),
    ]
    about = {
        "model": facts["base_model"],
        "weights": facts.get("base_weights", ""),
        "method_name": results.get("method_name", "LRQuant"),
        "precision": facts["precision"],
        "device": "cpu" if "cpu" in results else None,
        "sizes": {"bfloat16_bytes": verified.as_bf16},
    }
    fits = {"written": facts["format"], "formats": {facts["format"]: size | {"runtimes": {}}}}
    return _contents(path.resolve().name, about, told, results) | {"fits": fits}


def _results(path: Path) -> Contents:
    """What `lrquant evaluate` left in an output_dir."""
    results = read_json(path / "results.json")
    name = str(results.get("model", path.name))
    about = {"model": name, "precision": results.get("precision", "")}
    told = [("What", "results of lrquant evaluate"), ("Precision", str(about["precision"]))]
    contents = _contents(path.resolve().name, about, told, results)
    if not Path(name).exists():
        return contents
    of_model = compared_contents(name)
    kept = {key: of_model["run"][key] for key in ("weights", "method_name", "sizes")}
    contents["run"] |= {"facts": of_model["run"]["facts"] + told[1:], **kept}
    return contents | {"fits": of_model["fits"], "missing": contents["missing"]}


def _model(target: str) -> Contents:
    files = resolve_model(target, None)
    stored = files.folder if files.gguf_file is None else files.folder / files.gguf_file
    size = stored.stat().st_size if stored.is_file() else _weights_bytes(stored)
    if not size:
        raise LRQuantError(f"{target}: no weights there{nearest_beside(Path(target))}")
    contents = _contents(Path(target).name, {"model": target}, [("What", "model")], {})
    fits = {"written": "as stored", "formats": {"as stored": {"bytes": size, "runtimes": {}}}}
    missing = f"any measure: lrquant evaluate {target} --output-dir DIR, then lrquant compare … DIR"
    return contents | {"fits": fits, "missing": [missing]}


def _contents(
    name: str, about: JsonObject, told: list[tuple[str, str]], results: JsonObject
) -> Contents:
    measured = {kind: results[kind] for kind in (*kinds(results), "others") if results.get(kind)}
    measured |= {VERDICT: results[VERDICT]} if VERDICT in results else {}
    run = {
        **{"folder": name, "name": name, "weights": "", "method_name": "full precision"},
        **{"precision": "", "device": results.get("device"), "command": "", "later_commands": []},
        **{"settings": {}, "sizes": {}, "unpacked_from": results.get("unpacked_from", "")},
        **about,
    }
    run["facts"] = [("Model", str(run["model"])), *((k, v) for k, v in told if v)]
    return {
        "written_by": f"lrquant {__version__}",
        "run": run,
        "results": without_non_finite(measured, str),
        **{"blocks": [], "tower_blocks": [], "worst_linears": [], "missing": []},
        "fits": {"written": "", "formats": {}},
    }


def _weights_bytes(folder: Path) -> int:
    sizes = [sum(p.stat().st_size for p in folder.glob(pattern)) for pattern in _WEIGHTS]
    return next((size for size in sizes if size), 0)


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
