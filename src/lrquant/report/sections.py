"""The tables of a report, of one run or several, for every form that shows them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.filesize import decimal

from lrquant.report.tables import AGREEMENT, COLUMNS, picture_rows, task_rows, verdict

ADAPTED_NOTE = (
    "Test-time adaptation learned the last blocks again on the text that it is scored on (never "
    "on labels): not comparable with the other columns."
)


@dataclass(frozen=True)
class Table:
    """Cells as text under a head; `note` says what the numbers are."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def facts(run: dict[str, Any]) -> list[tuple[str, str]]:
    """What the run is, by label."""
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    learned, blocks = run["learned_blocks"], run["blocks"]
    statistics = ", ".join(run["statistics"])
    listed = [
        ("Model", f"{run['model']} ({run['model_type']}, {blocks} blocks)"),
        ("Weights' SHA-256", run["weights"]),
        ("Scheme", run["scheme_in_words"]),
        ("Vision tower", run.get("tower", "")),
        ("Method", run["method"]),
        ("Calibration", run["calibration"]),
        ("Data's SHA-256", run["data"]["sha256"]),
        ("Statistics' SHA-256", statistics),
        ("Seed", str(run["seed"])),
        ("Precision", f"{run['precision']} matrix products on {run['device'] or 'a device'}"),
        ("Time", f"{duration(run['seconds'])} for {learned} of {blocks} blocks"),
        ("Peak memory", decimal(run["peak_memory_bytes"])),
        ("Learned parameters", decimal(run["parameter_bytes"])),
        ("Versions", versions),
    ]
    return [(label, text) for label, text in listed if text]


def duration(seconds: float) -> str:
    """1 h 02 min, 3 min 04 s, 5.6 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def result_tables(runs: Sequence[dict[str, Any]], names: Sequence[str]) -> list[Table]:
    """Perplexities, tasks, agreement; of several runs, one row each, with its name."""
    perplexities = [_perplexities(runs[0])] if len(runs) == 1 else _by_text(runs, names)
    along = _along_windows(runs[0]) if len(runs) == 1 else []
    tables = [*perplexities, _pictures(runs, names), _tasks(runs, names)]
    tables += [_agreements(runs, names), *along]
    return [table for table in tables if table.rows]


def _labels(contents: dict[str, Any], name: str, alone: bool) -> dict[str, str]:
    labels = {**COLUMNS, "quantized": contents["run"]["method_name"]}
    return labels if alone else {key: f"{name}: {label}" for key, label in labels.items()}


def _perplexities(contents: dict[str, Any]) -> Table:
    measured = contents["results"].get("perplexity", {})
    labels = _measured(_labels(contents, "", True), measured.values())
    notes = [f"{text}: {scores['text']}." for text, scores in measured.items() if "text" in scores]
    return Table(
        "Perplexity",
        ["text", *labels.values()],
        [[text, *(number(scores.get(key)) for key in labels)] for text, scores in measured.items()],
        " ".join([*notes, *_adapted_note(labels)]),
    )


def _by_text(runs: Sequence[dict[str, Any]], names: Sequence[str]) -> list[Table]:
    """One table a text; each row says over which windows of it."""
    texts = dict.fromkeys(text for each in runs for text in each["results"].get("perplexity", {}))
    tables = []
    for text in texts:
        scores = [each["results"].get("perplexity", {}).get(text, {}) for each in runs]
        labels = _measured({**COLUMNS, "quantized": "learned"}, scores)
        rows = [
            [name, *(number(each.get(key)) for key in labels), each.get("text", "not measured")]
            for name, each in zip(names, scores, strict=True)
        ]
        head = ["run", *labels.values(), "windows"]
        tables.append(Table(f"Perplexity on {text}", head, rows, " ".join(_adapted_note(labels))))
    return tables


def _measured(labels: dict[str, str], scores: Iterable[dict[str, Any]]) -> dict[str, str]:
    found = {key for each in scores for key, value in each.items() if value is not None}
    return {key: label for key, label in labels.items() if key in found}


def _adapted_note(labels: dict[str, str]) -> list[str]:
    return [ADAPTED_NOTE] if "test_time_adapted" in labels else []


def _pictures(runs: Sequence[dict[str, Any]], names: Sequence[str]) -> Table:
    rows: list[list[str]] = []
    for contents, name in zip(runs, names, strict=True):
        head, found = picture_rows(contents["results"], _labels(contents, "", True))
        prefix = "" if len(runs) == 1 else f"{name}: "
        rows += [
            [f"{prefix}{what}, {model}", value]
            for what, *values in found
            for model, value in zip(head, values, strict=True)
        ]
    return Table("Pictures", ["set and model", "share right"], rows)


def _agreements(runs: Sequence[dict[str, Any]], names: Sequence[str]) -> Table:
    rows = []
    for contents, name in zip(runs, names, strict=True):
        labels = _labels(contents, name, len(runs) == 1)
        for text, variants in contents["results"].get("agreement", {}).items():
            rows += [
                [f"{text}, {labels[key]}", *(figure(scores.get(part)) for part in AGREEMENT)]
                for key, scores in variants.items()
                if key in labels
            ]
    return Table(
        "Agreement with full precision",
        ["text and model", *AGREEMENT.values()],
        rows,
        "KL divergence of next-token distributions from the full-precision model, in nats, and how "
        "often both prefer the same token.",
    )


def _along_windows(contents: dict[str, Any]) -> list[Table]:
    """How agreement goes along the window: a table a text."""
    labels = _labels(contents, "", True)
    tables = []
    for text, variants in contents["results"].get("agreement", {}).items():
        found = {
            key: variants[key]["positions"]
            for key in labels
            if "positions" in variants.get(key, {})
        }
        if not found:
            continue
        kinds = {"kl_mean": "mean KL", "same_top": "same top token"}
        spans = next(iter(found.values()))
        tables.append(
            Table(
                f"Agreement along the window, {text}",
                [
                    "tokens read",
                    *(f"{what}, {labels[key]}" for what in kinds.values() for key in found),
                ],
                [
                    [
                        _span(span["first"], span["last"]),
                        *(figure(found[key][row].get(kind)) for kind in kinds for key in found),
                    ]
                    for row, span in enumerate(spans)
                ],
                "Of predictions from so many tokens of their window.",
            )
        )
    return tables


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}–{last}"


def _tasks(runs: Sequence[dict[str, Any]], names: Sequence[str]) -> Table:
    """The harness's numbers with their standard errors, the models side by side."""
    columns: list[str] = []
    cells: dict[str, dict[str, str]] = {}
    for contents, name in zip(runs, names, strict=True):
        whose = "" if len(runs) == 1 else f"{name}: "
        head, rows = task_rows(contents["results"], _labels(contents, "", True))
        columns += [whose + label for label in head]
        for first, *values in rows:
            found = zip(head, values, strict=True)
            cells.setdefault(first, {}).update({whose + label: value for label, value in found})
    rows = [[first, *(found.get(label, "") for label in columns)] for first, found in cells.items()]
    of_groups = any("part_of" in e for c in runs for e in c["results"].get("tasks", {}).values())
    notes = ["± standard error; of differences (from …) that of the pairs, item by item."]
    notes += ["The tasks of a group are in report.json."] if of_groups else []
    notes += [
        f"{verdict(c['results'])[:1].upper()}{verdict(c['results'])[1:]}."
        for c in runs
        if verdict(c["results"])
    ]
    return Table("Zero-shot tasks", ["task and metric", *columns], rows, " ".join(notes))


def adaptation_table(contents: dict[str, Any]) -> Table:
    """How test-time adaptation went."""
    done = contents["results"].get("test_time_adaptation", {})
    rows = [
        [text, str(block["block"]), number(block["initial_loss"]), number(block["final_loss"])]
        for text, adapted in done.items()
        for block in adapted["blocks"]
    ]
    head = ["text", "block", "loss before", "loss after"]
    return Table("Test-time adaptation", head, rows, ADAPTED_NOTE)


def worst_table(contents: dict[str, Any]) -> Table:
    """The linears that add most error."""
    rows = [
        [
            f"{entry['block']} {entry['linear']}",
            *(decibels(entry[key]) for key in ("own_snr", "own_snr_round_to_nearest", "snr")),
        ]
        for entry in contents["worst_linears"]
    ]
    return Table(
        "Worst linears",
        ["block and linear", "own SNR", "own at RTN", "output SNR"],
        rows,
        "Signal-to-noise ratio in dB, low is bad. Own: the output against the full-precision "
        "product of the very input that the linear reads, so only what its own weights and its "
        "input's quantizer add. Output: against that of the full-precision block on the same block "
        "input, so with what the linears before it in the block add.",
    )


def block_table(contents: dict[str, Any]) -> Table:
    """One row a block: losses, cosines, errors."""
    blocks = contents["blocks"]
    first = next((block["figures"] for block in blocks if block["figures"]), None)
    rows = []
    for block in blocks:
        figures = block["figures"]
        rows.append(
            [
                str(block["block"]),
                *_pair(figures, "loss", number),
                *_pair(figures, "cosine", figure),
                *_pair(figures, "error_made", percent),
                percent(figures["error_carried"]) if figures else "",
                percent(figures["error"]["learned"]) if figures else "",
                f"{number(block['initial_loss'])} → {number(block['final_loss'])}",
                duration(block["seconds"]),
                decimal(block["peak_memory_bytes"]),
                "; ".join(block["non_finite"]) or "–",
            ]
        )
    looked = (
        f"Over {first['samples']} samples ({first['tokens']} tokens) of the calibration set: "
        "loss and mean cosine with the full-precision output, at round-to-nearest of this block "
        "alone (RTN; the blocks before it as learned) and after learning; error energy relative to "
        "the output's, made in the block and carried in by its input. "
        if first
        else ""
    )
    head, rows = _without_empty(["block", *_BLOCK_HEAD], rows)
    return Table(
        "Blocks",
        head,
        rows,
        looked + "Start → end: the learning's loss over the whole calibration set, from where it "
        "starts (scales and clipping set, not round-to-nearest).",
    )


_BLOCK_HEAD = (
    *("loss RTN", "learned", "cosine RTN", "learned", "made RTN", "learned", "carried in"),
    *("in all", "start → end, all samples", "time", "peak memory", "not finite"),
)


def tower_tables(contents: dict[str, Any]) -> list[Table]:
    """The blocks and linears of the vision tower, if it is quantised."""
    tower = {**contents, "blocks": contents["tower_blocks"]}
    if not tower["blocks"]:
        return []
    return [
        replace(table, title=f"Vision tower: {table.title.lower()}")
        for table in (block_table(tower), linear_table(tower))
        if table.rows
    ]


def _without_empty(
    head: Sequence[str], rows: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    """The table without columns that have no text in any row."""
    kept = [index for index in range(len(head)) if any(row[index] for row in rows)]
    return [head[index] for index in kept], [[row[index] for index in kept] for row in rows]


def linear_table(contents: dict[str, Any]) -> Table:
    """The output's signal-to-noise ratio of every linear: round-to-nearest, then learned."""
    blocks = [block for block in contents["blocks"] if block["figures"]]
    linears = list(blocks[0]["figures"]["linears"]) if blocks else []
    rows = [
        [
            str(block["block"]),
            *(
                " → ".join(decibels(value) for value in figures["snr"].values())
                for figures in block["figures"]["linears"].values()
            ),
        ]
        for block in blocks
    ]
    tokens = blocks[0]["figures"]["linear_tokens"] if blocks else 0
    return Table(
        "Signal-to-noise ratio of each linear's output",
        ["block", *linears],
        rows,
        f"In dB, round-to-nearest → learned, over {tokens} tokens, against the full-precision "
        "block on the same block input.",
    )


def _pair(
    figures: dict[str, Any] | None, name: str, words: Callable[[float | None], str]
) -> list[str]:
    if figures is None:
        return ["", ""]
    return [words(figures[name][variant]) for variant in ("round_to_nearest", "learned")]


def number(value: float | None) -> str:
    """A loss or perplexity, four digits or so."""
    if value is None:
        return ""
    return f"{value:.2f}" if 10 <= abs(value) < 1e4 else f"{value:#.4g}"


def figure(value: float | None) -> str:
    """A share or divergence."""
    return "" if value is None else f"{value:.4f}"


def percent(value: float | None) -> str:
    """A ratio as per cent, three digits."""
    if value is None:
        return ""
    digits = f"{100 * value:#.3g}".rstrip(".") if value else "0"
    return f"{digits}\N{NO-BREAK SPACE}%"


def decibels(value: float | None) -> str:
    """One digit; a linear that adds no error has no ratio."""
    return "–" if value is None else f"{value:.1f}"
