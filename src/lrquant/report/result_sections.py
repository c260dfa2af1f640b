"""The tables of a report that show measures, of one run or of several side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lrquant.files.whole import JsonObject
from lrquant.measures.numbers import divergence, number, share
from lrquant.measures.tables import (
    AGREEMENT,
    COLUMNS,
    SPREAD_NOTE,
    agreement_rows,
    labels_of,
    named,
    picture_rows,
    task_rows,
    verdict,
)
from lrquant.report.sections import Table

ADAPTED_NOTE = (
    "Test-time adaptation learned the last blocks again on the text that it is scored on (never "
    "on labels): not comparable with the other columns."
)


def result_tables(runs: Sequence[JsonObject], names: Sequence[str]) -> list[Table]:
    """Perplexities, tasks, agreement; of several runs, one row each, with its name."""
    perplexities = [_perplexities(runs[0])] if len(runs) == 1 else _by_text(runs, names)
    along = _along_windows(runs[0]) if len(runs) == 1 else []
    tables = [*perplexities, _pictures(runs, names), _tasks(runs, names)]
    tables += [_agreements(runs, names), *along]
    return [table for table in tables if table.rows]


def labels(contents: JsonObject, name: str = "") -> dict[str, str]:
    """What the columns of a run are called, after its name where there are several runs."""
    before = f"{name}: " if name else ""
    return {key: before + label for key, label in labels_of(_labelled(contents)).items()}


def _labelled(contents: JsonObject) -> JsonObject:
    run = contents["run"]
    about = {"method_name": run["method_name"], "unpacked_from": run.get("unpacked_from", "")}
    return contents["results"] | about


def _perplexities(contents: JsonObject) -> Table:
    measured = named(contents["results"], "perplexity")
    shown = _measured(labels(contents), (scores for *_, scores in measured))
    rows = [
        [name + about, *(number(scores.get(key)) for key in shown)]
        for name, about, scores in measured
    ]
    notes = [f"{name}: {_of_what(scores)}." for name, _, scores in measured if "text" in scores]
    note = " ".join([*dict.fromkeys(notes), *_adapted_note(shown)])
    return Table("Perplexity", ["text", *shown.values()], rows, note)


def _of_what(scores: JsonObject) -> str:
    """Which windows a measure is of, and how a column of it was made otherwise."""
    said = [scores.get("text", "not measured")]
    if "reference_precision" in scores:
        said.append(f"full precision in {scores['reference_precision']}")
    if "base_model" in scores:
        said.append(f"base: {scores['base_model']}")
    if "adapted" in scores:
        said.append(f"adapted: {scores['adapted']}")
    return "; ".join(said)


def _by_text(runs: Sequence[JsonObject], names: Sequence[str]) -> list[Table]:
    """One table a text; each row says over which windows, and of which model if they differ."""
    alike = len({each["run"].get("weights") for each in runs}) == 1
    measured = [named(contents["results"], "perplexity") for contents in runs]
    tables = []
    for text in dict.fromkeys(name for own in measured for name, *_ in own):
        rows = []
        for contents, run, own in zip(runs, names, measured, strict=True):
            of_text = [(about, scores) for name, about, scores in own if name == text]
            rows += [(contents, run + about, e) for about, e in of_text or [("", {})]]
        shown = _measured({**COLUMNS, "quantized": "learned"}, (scores for *_, scores in rows))
        cells = [
            [
                run,
                *(number(scores.get(key)) for key in shown),
                _of_what(scores),
                *([] if alike else [_model(contents)]),
            ]
            for contents, run, scores in rows
        ]
        head = ["run", *shown.values(), "windows", *([] if alike else ["model"])]
        notes = _adapted_note(shown)
        if not alike:
            notes += ["The runs are of different models: full precision is each run's own."]
        tables.append(Table(f"Perplexity on {text}", head, cells, " ".join(notes)))
    return tables


def _model(contents: JsonObject) -> str:
    """Its name with what it was unpacked from, if anything."""
    about = contents["run"]
    origin = f", unpacked from {about['unpacked_from']}" if about.get("unpacked_from") else ""
    return f"{about['model']}{origin}"


def _measured(labels: dict[str, str], scores: Iterable[JsonObject]) -> dict[str, str]:
    measured = {key for each in scores for key, value in each.items() if value is not None}
    return {key: label for key, label in labels.items() if key in measured}


def _adapted_note(shown: dict[str, str]) -> list[str]:
    return [ADAPTED_NOTE] if "test_time_adapted" in shown else []


def _pictures(runs: Sequence[JsonObject], names: Sequence[str]) -> Table:
    rows: list[list[str]] = []
    for contents, name in zip(runs, names, strict=True):
        head, measured = picture_rows(contents["results"], labels(contents))
        prefix = "" if len(runs) == 1 else f"{name}: "
        rows += [
            [f"{prefix}{what}, {model}", value]
            for what, *values in measured
            for model, value in zip(head, values, strict=True)
        ]
    return Table("Pictures", ["set and model", "share right"], rows, SPREAD_NOTE)


def _agreements(runs: Sequence[JsonObject], names: Sequence[str]) -> Table:
    rows = []
    for contents, name in zip(runs, names, strict=True):
        own = labels(contents, "" if len(runs) == 1 else name)
        rows += agreement_rows(contents["results"], own)
    return Table(
        "Agreement with full precision",
        ["text and model", *AGREEMENT.values()],
        rows,
        "KL divergence of next-token distributions from the full-precision model, in nats, and how "
        "often both prefer the same token. KL p99: what 99 % of the predictions do not exceed; of "
        "fewer than 100, the largest.",
    )


def _along_windows(contents: JsonObject) -> list[Table]:
    """How agreement goes along the window: a table a text."""
    columns = labels(contents)
    tables = []
    for text, about, variants in named(contents["results"], "agreement"):
        found = {
            key: variants[key]["positions"]
            for key in columns
            if "positions" in variants.get(key, {})
        }
        if not found:
            continue
        kinds = {"kl_mean": ("mean KL", divergence), "same_top": ("same top token", share)}
        spans = next(iter(found.values()))
        tables.append(
            Table(
                f"Agreement along the window, {text}{about}",
                [
                    "tokens read",
                    *(f"{what}, {columns[key]}" for what, _ in kinds.values() for key in found),
                ],
                [
                    [
                        _span(span["first"], span["last"]),
                        *(
                            words(found[key][row].get(kind))
                            for kind, (_, words) in kinds.items()
                            for key in found
                        ),
                    ]
                    for row, span in enumerate(spans)
                ],
                "Of predictions from so many tokens of their window.",
            )
        )
    return tables


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}–{last}"


def _tasks(runs: Sequence[JsonObject], names: Sequence[str]) -> Table:
    """The harness's numbers with their standard errors, the models side by side."""
    columns: list[str] = []
    cells: dict[str, dict[str, str]] = {}
    for contents, name in zip(runs, names, strict=True):
        whose = "" if len(runs) == 1 else f"{name}: "
        head, rows = task_rows(contents["results"], labels(contents))
        columns += [whose + label for label in head]
        for first, *values in rows:
            found = zip(head, values, strict=True)
            cells.setdefault(first, {}).update({whose + label: value for label, value in found})
    rows = [[first, *(found.get(label, "") for label in columns)] for first, found in cells.items()]
    of_groups = any("part_of" in e for c in runs for e in c["results"].get("tasks", {}).values())
    notes = [f"{SPREAD_NOTE} Of differences (from …) it is that of the pairs, item by item."]
    notes += ["The tasks of a group are in report.json."] if of_groups else []
    notes += [
        f"{verdict(c['results'])[:1].upper()}{verdict(c['results'])[1:]}."
        for c in runs
        if verdict(c["results"])
    ]
    return Table("Zero-shot tasks", ["task and metric", *columns], rows, " ".join(notes))


def adaptation_table(contents: JsonObject) -> Table:
    """How test-time adaptation went."""
    rows = [
        [text + about, str(b["block"]), number(b["initial_loss"]), number(b["final_loss"])]
        for text, about, adapted in named(contents["results"], "test_time_adaptation")
        for b in adapted["blocks"]
    ]
    head = ["text", "block", "loss before", "loss after"]
    return Table("Test-time adaptation", head, rows, ADAPTED_NOTE)
