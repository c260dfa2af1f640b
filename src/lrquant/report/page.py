"""report.html and the page of a comparison: templates filled with tables and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.filesize import decimal

from lrquant.report import charts, comparison_charts, tensor_charts
from lrquant.report.sections import (
    Table,
    adaptation_table,
    block_table,
    duration,
    facts,
    figure,
    linear_table,
    number,
    result_tables,
    tower_tables,
    worst_table,
)
from lrquant.report.tables import COLUMNS
from lrquant.workdir import RunFolder

_TILES = 2  # texts whose perplexities stand at the top


def run_page(contents: dict[str, Any], folder: RunFolder) -> str:
    """One run's page: no script, nothing fetched, all text escaped by the templates."""
    run = contents["run"]
    errors = [worst_table(contents), block_table(contents), linear_table(contents)]
    errors += tower_tables(contents)
    return _template("run.html").render(
        title=f"{run['name']} · {run['scheme']} · {run['method_name']}",
        run=run,
        written_by=contents["written_by"],
        tiles=_tiles(contents),
        facts=facts(run),
        missing=contents["missing"],
        results=[*result_tables([contents], [""]), *_filled(adaptation_table(contents))],
        worst_blocks=contents["worst_blocks"],
        errors=[table for table in errors if table.rows],
        error_pictures=charts.error_pictures(contents),
        learning_pictures=charts.learning_pictures(contents),
        scaled=any("scale" in block["parameters"] for block in contents["blocks"]),
        activation_pictures=tensor_charts.activation_pictures(contents, folder),
        parameter_pictures=charts.parameter_pictures(contents),
        weight_pictures=tensor_charts.weight_pictures(contents, folder),
    )


def comparison_page(runs: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """Several runs side by side."""
    listed = [dict(facts(contents["run"])) for contents in runs]
    labels = list(dict.fromkeys(label for each in listed for label in each))
    commands = [contents["run"]["command"] for contents in runs]
    return _template("compare.html").render(
        title=f"{len(runs)} runs compared",
        names=names,
        written_by=runs[0]["written_by"],
        facts=[(label, [each.get(label, "–") for each in listed]) for label in labels],
        commands=list(zip(names, commands, strict=True)),
        results=result_tables(runs, names),
        pictures=comparison_charts.comparison_pictures(runs, names),
        worst=[
            (name, table)
            for name, contents in zip(names, runs, strict=True)
            for table in _filled(worst_table(contents))
        ],
        missing=[
            (name, contents["missing"])
            for name, contents in zip(names, runs, strict=True)
            if contents["missing"]
        ],
    )


def _template(name: str) -> Any:
    environment = Environment(
        loader=PackageLoader("lrquant.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _filled(table: Table) -> list[Table]:
    return [table] if table.rows else []


def _tiles(contents: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(label, value, note) of the numbers that people look for first."""
    run = contents["run"]
    labels = {**COLUMNS, "quantized": run["method_name"]}
    tiles = []
    for text, scores in list(contents["results"].get("perplexity", {}).items())[:_TILES]:
        beside = [
            f"{labels[key]} {number(scores[key])}"
            for key in ("full_precision", "round_to_nearest")
            if scores.get(key) is not None
        ]
        value = number(scores.get("quantized")) or "–"
        tiles.append((f"perplexity, {text}", value, ", ".join(beside)))
    for text, variants in list(contents["results"].get("agreement", {}).items())[:1]:
        scores = variants.get("quantized", {})
        if scores.get("kl_mean") is not None:
            share = f"{100 * scores['same_top']:.1f} % same top token"
            tiles.append((f"mean KL, {text}", f"{scores['kl_mean']:.3f}", share))
    for name, variants in list(contents["results"].get("vqa", {}).items())[:1]:
        if "quantized" in variants:
            share = f"{100 * variants['quantized']['exact_match']:.1f} %"
            tiles.append((f"right answers, {Path(name).name}", share, ""))
    for label, means in list(contents["results"].get("task_means", {}).items())[-1:]:
        found = means.get("acc_norm", {})  # the plain accuracy where a task has no other
        beside = [
            f"{labels[key]} {figure(found[key]['mean'])}"
            for key in ("full_precision", "round_to_nearest")
            if key in found
        ]
        if "quantized" in found:
            tiles.append((label, figure(found["quantized"]["mean"]), ", ".join(beside)))
    each = run["seconds"] / max(run["learned_blocks"], 1)
    tiles.append(("learning time", duration(run["seconds"]), f"{duration(each)} a block"))
    tiles.append(("peak memory", decimal(run["peak_memory_bytes"]), run["device"] or ""))
    return tiles
