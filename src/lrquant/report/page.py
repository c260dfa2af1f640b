"""report.html and the page of a comparison: templates filled with tables and pictures."""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from rich.filesize import decimal

from lrquant.measures.numbers import duration
from lrquant.measures.rows import Table
from lrquant.report import charts, comparison_charts, tensor_charts
from lrquant.report.result_sections import adaptation_table, result_tables, result_tiles
from lrquant.report.sections import (
    block_table,
    facts,
    linear_table,
    tower_tables,
    worst_sentence,
    worst_table,
)
from lrquant.report.values import Contents
from lrquant.runs.folder import RunFolder


def run_page(contents: Contents, folder: RunFolder) -> str:
    """One run's page: no script, nothing fetched, all text escaped by the templates."""
    run, blocks = contents["run"], contents["blocks"]
    errors = [worst_table(contents["worst_linears"]), block_table(blocks), linear_table(blocks)]
    errors += tower_tables(contents["tower_blocks"])
    return _template("run.html").render(
        title=f"{run['name']} · {run['scheme']} · {run['method_name']}",
        run=run,
        written_by=contents["written_by"],
        tiles=_tiles(contents),
        facts=facts(run),
        missing=contents["missing"],
        results=[*result_tables([contents], [""]), *_filled(adaptation_table(contents))],
        worst=worst_sentence(contents["worst_blocks"], blocks),
        errors=[table for table in errors if table.rows],
        error_pictures=charts.error_pictures(blocks),
        learning_pictures=charts.learning_pictures(blocks, run["blocks"]),
        activations_quantised=run["activations_quantised"],
        scaled=any("scale" in block["parameters"] for block in blocks),
        activation_pictures=tensor_charts.activation_pictures(blocks, folder),
        parameter_pictures=charts.parameter_pictures(blocks),
        weight_pictures=tensor_charts.weight_pictures(blocks, folder),
    )


def comparison_page(runs: Sequence[Contents], names: Sequence[str]) -> str:
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
            for table in _filled(worst_table(contents["worst_linears"]))
        ],
        missing=[
            (name, contents["missing"])
            for name, contents in zip(names, runs, strict=True)
            if contents["missing"]
        ],
    )


def _template(name: str) -> Template:
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


def _tiles(contents: Contents) -> list[tuple[str, str, str]]:
    """(label, value, note) of the numbers that people look for first."""
    run = contents["run"]
    tiles = [(tile.label, tile.value, tile.note) for tile in result_tiles(contents)]
    each = run["seconds"] / max(run["learned_blocks"], 1)
    tiles.append(("learning time", duration(run["seconds"]), f"{duration(each)} a block"))
    tiles.append(("peak memory", decimal(run["peak_memory_bytes"]), run["device"] or ""))
    return tiles
