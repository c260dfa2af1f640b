"""The printed table of results: what every measure shows, one under the other."""

from __future__ import annotations

from lrquant.measures.choice import measures
from lrquant.measures.rows import labels_of
from lrquant.runs.results import Entry, Results, entries, kinds


def results_table(results: Results) -> str:
    """All measures side by side, one row a set; empty if there are none."""
    labels = labels_of(results)
    shown = [text for measure in measures() for text in measure.tables(results, labels)]
    return "\n\n".join(filter(None, shown))


def kinds_in_order(results: Results) -> list[str]:
    """The kinds that `results` have: in the order of the measures, then all others."""
    present = kinds(results)
    declared = [kind for measure in measures() for kind in measure.kinds if kind in present]
    return list(dict.fromkeys([*declared, *present]))


def measured_entries(results: Results) -> list[Entry]:
    """The entries of every kind, in the order of the kinds."""
    return [entry for kind in kinds_in_order(results) for _, entry in entries(results, kind)]
