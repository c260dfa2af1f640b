"""The tables of a report that show measures, of one run or of several side by side."""

from __future__ import annotations

from collections.abc import Sequence

from lrquant.measures.choice import measures
from lrquant.measures.numbers import number
from lrquant.measures.rows import ADAPTED_NOTE, RunResults, Table, Tile, labels_of, named
from lrquant.reports.values import Contents
from lrquant.runs.results import figure, record


def result_tables(runs: Sequence[Contents], names: Sequence[str]) -> list[Table]:
    """Every measure's tables; of several runs, each row or column says of which it is."""
    told = [_told(*each, len(runs) > 1) for each in zip(runs, names, strict=True)]
    tables = [table for measure in measures() for table in measure.report_tables(told)]
    return [table for table in tables if table.rows]


def result_tiles(contents: Contents) -> list[Tile]:
    """The numbers of measures that people look for first."""
    told = _told(contents, "", False)
    return [tile for measure in measures() for tile in measure.tiles(told)]


def _told(contents: Contents, name: str, several: bool) -> RunResults:
    """A run's results; its model is named with what it was unpacked from, if anything."""
    about = contents["run"]
    origin = f", unpacked from {about['unpacked_from']}" if about.get("unpacked_from") else ""
    return RunResults(
        contents["results"],
        labels(contents),
        name if several else "",
        f"{about.get('model')}{origin}",
        str(about.get("weights")),
    )


def labels(contents: Contents) -> dict[str, str]:
    """What the columns of a run are called."""
    run = contents["run"]
    about = {"method_name": run["method_name"], "unpacked_from": run.get("unpacked_from", "")}
    return labels_of(contents["results"] | about)


def adaptation_table(contents: Contents) -> Table:
    """How test-time adaptation went."""
    rows = []
    for text, about, adapted in named(contents["results"], "test_time_adaptation"):
        blocks = adapted.get("blocks")
        for block in map(record, blocks if isinstance(blocks, list) else ()):
            losses = [number(figure(block[key])) for key in ("initial_loss", "final_loss")]
            rows.append([text + about, str(block["block"]), *losses])
    head = ["text", "block", "loss before", "loss after"]
    return Table("Test-time adaptation", head, rows, ADAPTED_NOTE)
