"""report.html and the page of a comparison: templates filled with tables and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from rich.filesize import decimal

from lrquant.measures.numbers import duration
from lrquant.measures.rows import Table
from lrquant.report import charts, comparison_charts, tensor_charts
from lrquant.report.decision import recovered_tile
from lrquant.report.fitting import fitting_table, size_in_words
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
    fits = fitting_table(contents["fits"])
    shown: dict[str, Sequence[object]] = {
        "results": [*result_tables([contents], [""]), *_filled(adaptation_table(contents))],
        "examples": [{**e, "same": e["quantized"] == e["full_precision"]} for e in run["examples"]],
        "errors": [table for table in errors if table.rows],
        "error_pictures": charts.error_pictures(blocks),
        "learning_pictures": charts.learning_pictures(blocks, run["blocks"]),
        "parameter_pictures": charts.parameter_pictures(blocks),
        "activation_pictures": tensor_charts.activation_pictures(blocks, folder),
        "weight_pictures": tensor_charts.weight_pictures(blocks, folder),
    }
    return _template("run.html").render(
        title=f"{run['name']} · {run['scheme']} · {run['method_name']}",
        run=run,
        written_by=contents["written_by"],
        tiles=_tiles(contents),
        facts=facts(run),
        missing=contents["missing"],
        first=contents["first"],
        warnings=contents["warnings"],
        headings=_headings(shown, bool(fits.rows)),
        fits=fits,
        worst=worst_sentence(contents["worst_blocks"], blocks),
        activations_quantised=run["activations_quantised"],
        scaled=any("scale" in block["parameters"] for block in blocks),
        **shown,
    )


_HEADINGS = {
    "results": ("Results", ("results",)),
    "examples": ("What it writes", ("examples",)),
    "fits": ("Where it runs", ("fits",)),
    "errors": ("Where the error is made", ("errors", "error_pictures")),
    "learned": ("What was learned", ("learning_pictures", "parameter_pictures")),
    "activations": ("Activations", ("activation_pictures",)),
    "weights": ("Weights and codes", ("weight_pictures",)),
    "run": ("The run", ("run",)),
    "repeat": ("Repeat it", ("run",)),
}


def _headings(shown: Mapping[str, Sequence[object]], fits: bool) -> list[tuple[str, str]]:
    """(anchor, words) of the sections that a page has."""
    there = (
        {name for name, parts in shown.items() if parts} | {"run"} | ({"fits"} if fits else set())
    )
    return [(anchor, words) for anchor, (words, of) in _HEADINGS.items() if there & set(of)]


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
    size = size_in_words(contents["fits"], run["sizes"])
    tiles = [] if size is None else [("size", *size)]
    tiles += filter(None, [recovered_tile(contents["results"])])
    tiles += [(tile.label, tile.value, tile.note) for tile in result_tiles(contents)]
    each = run["seconds"] / max(run["learned_blocks"], 1)
    tiles.append(("learning time", duration(run["seconds"]), f"{duration(each)} a block"))
    tiles.append(("peak memory", decimal(run["peak_memory_bytes"]), run["device"] or ""))
    return tiles
