"""report.html and the page of a comparison: templates filled with tables and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from rich.filesize import decimal

from lrquant.measures.numbers import duration
from lrquant.measures.rows import Table
from lrquant.reports import charts, comparison_charts, tensor_charts
from lrquant.reports.decision import recovered_tile
from lrquant.reports.differences import differences, settings_that_differ
from lrquant.reports.fitting import fitting_table, size_in_words
from lrquant.reports.result_sections import adaptation_table, result_tables, result_tiles
from lrquant.reports.sections import (
    block_table,
    expert_table,
    facts,
    linear_table,
    tower_tables,
    worst_sentence,
    worst_table,
)
from lrquant.reports.values import Contents
from lrquant.runs.folder import RunFolder


def run_page(contents: Contents, folder: RunFolder) -> str:
    """One run's page: no script, nothing fetched, all text escaped by the templates."""
    run, blocks = contents["run"], contents["blocks"]
    errors = [worst_table(contents["worst_linears"]), block_table(blocks), linear_table(blocks)]
    errors += [expert_table(blocks), *tower_tables(contents["tower_blocks"])]
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
    """Runs, checkpoints and models side by side."""
    listed = [_facts(contents) for contents in runs]
    labels = list(dict.fromkeys(label for each in listed for label in each))
    each_run = list(zip(names, runs, strict=True))
    return _template("compare.html").render(
        title=f"{len(runs)} {_what(runs)} compared",
        names=names,
        written_by=runs[0]["written_by"],
        differences=differences(runs, names),
        settings=settings_that_differ(runs, names),
        facts=[(label, [each.get(label, "–") for each in listed]) for label in labels],
        commands=[(n, _commands(c)) for n, c in each_run if c["run"]["command"]],
        results=result_tables(runs, names),
        pictures=comparison_charts.comparison_pictures(runs, names),
        worst=[(n, t) for n, c in each_run for t in _filled(worst_table(c["worst_linears"]))],
        missing=[(n, c["missing"]) for n, c in each_run if c["missing"]],
    )


def _what(runs: Sequence[Contents]) -> str:
    return "runs" if all("learned_blocks" in each["run"] for each in runs) else "models"


def _facts(contents: Contents) -> dict[str, str]:
    """Facts of a run, or those that something else says of itself; size first."""
    run = contents["run"]
    size = size_in_words(contents["fits"], run["sizes"])
    told = [] if size is None else [("Size", " ".join((size[0], f"({size[1]})")))]
    return dict([*told, *(run["facts"] if "facts" in run else facts(run))])


def _commands(contents: Contents) -> str:
    return "\n\n".join([contents["run"]["command"], *contents["run"]["later_commands"]])


def _template(name: str) -> Template:
    environment = Environment(
        loader=PackageLoader("lrquant.reports"),
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
