"""The tables of a report that say what a run is and what came of its blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import Literal

from rich.filesize import decimal

from lrquant.measures.numbers import decibels, duration, number, percent, share
from lrquant.measures.rows import Table
from lrquant.reports.values import (
    Block,
    Figures,
    LinearFigures,
    Run,
    WorstBlock,
    WorstLinear,
    figures_by_block,
    linears_of,
)


def facts(run: Run) -> list[tuple[str, str]]:
    """What the run is, by label."""
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    learned, blocks = run["learned_blocks"], run["blocks"]
    origin = f", unpacked from {run['unpacked_from']}" if run.get("unpacked_from") else ""
    statistics = ", ".join(run["statistics"])
    listed = [
        ("Model", f"{run['model']} ({run['model_type']}, {blocks} blocks{origin})"),
        ("Weights' SHA-256", run["weights"]),
        ("Scheme", run["scheme_in_words"]),
        ("Vision tower", run.get("tower", "")),
        ("Method", run["method"]),
        ("Calibration", run["calibration"]),
        ("Data's SHA-256", run["data"]["sha256"]),
        ("Statistics' SHA-256", statistics),
        ("Seed", str(run["seed"])),
        ("Precision", f"{run['precision']} matrix products on {_machine(run)}"),
        ("Learning time", f"{duration(run['seconds'])} for {learned} of {blocks} blocks"),
        ("Peak memory", f"{decimal(run['peak_memory_bytes'])}, of all that was done until then"),
        ("Learned parameters", decimal(run["parameter_bytes"])),
        ("Versions", versions),
    ]
    return [(label, text) for label, text in listed if text]


def _machine(run: Run) -> str:
    """cpu (AVX2, 2 threads) or cuda (NVIDIA H100), as far as it is known."""
    if run.get("gpu"):
        return f"{run['device']} ({run['gpu']})"
    threads = run.get("threads")
    if threads is None:
        return run["device"] or "a device"
    return f"{run['device']} ({run['cpu']}, {threads} thread{'' if threads == 1 else 's'})"


def worst_table(worst: Sequence[WorstLinear]) -> Table:
    """The linears that add most error."""
    rows = [
        [
            f"{entry['block']} {entry['linear']}",
            decibels(entry["own_snr"]),
            decibels(entry["own_snr_round_to_nearest"]),
            decibels(entry["snr"]),
        ]
        for entry in worst
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


def worst_sentence(worst: Sequence[WorstBlock], blocks: Sequence[Block]) -> str:
    """Which blocks add most error to their output, beside the block in the middle; or nothing."""
    worst = [entry for entry in worst if entry["error_made"] > 0]
    all_made = [each["error_made"]["learned"] for each in figures_by_block(blocks).values()]
    made = [value for value in all_made if value is not None]
    if not worst:
        return ""
    named_blocks = [f"block {entry['block']} ({percent(entry['error_made'])})" for entry in worst]
    if len(made) == 1:
        return f"Error made, of the output's energy: {named_blocks[0]}."
    beside = f"the median of {len(made)} blocks is {percent(median(made))}"
    return f"Most error for its output's energy: {', '.join(named_blocks)}; {beside}."


def block_table(blocks: Sequence[Block]) -> Table:
    """One row a block: losses, cosines, errors."""
    first = next(iter(figures_by_block(blocks).values()), None)
    rows = []
    for block in blocks:
        figures = block["figures"]
        rows.append(
            [
                str(block["block"]),
                *_pair(figures, "loss", number),
                *_pair(figures, "cosine", share),
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
    *("in all", "start → end, all samples", "time", "peak memory so far", "not finite"),
)


def tower_tables(blocks: Sequence[Block]) -> list[Table]:
    """The blocks and linears of the vision tower, if it is quantised."""
    if not blocks:
        return []
    return [
        replace(table, title=f"Vision tower: {table.title.lower()}")
        for table in (block_table(blocks), linear_table(blocks))
        if table.rows
    ]


def _without_empty(
    head: Sequence[str], rows: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    """The table without columns that have no text in any row."""
    kept = [index for index in range(len(head)) if any(row[index] for row in rows)]
    return [head[index] for index in kept], [[row[index] for index in kept] for row in rows]


def linear_table(blocks: Sequence[Block]) -> Table:
    """The output's signal-to-noise ratio of every linear: round-to-nearest, then learned."""
    figures = figures_by_block(blocks)
    first = next(iter(figures.values()), None)
    tokens = first["linear_tokens"] if first else 0
    linears = linears_of(figures.values())
    rows = [
        [str(block), *(_improvement(each["linears"].get(linear)) for linear in linears)]
        for block, each in figures.items()
    ]
    return Table(
        "Signal-to-noise ratio of each linear's output",
        ["block", *linears],
        rows,
        f"In dB, round-to-nearest → learned, over {tokens} tokens, against the full-precision "
        "block on the same block input. Blank where a block has no such linear.",
    )


def expert_table(blocks: Sequence[Block]) -> Table:
    """How many tokens reach a block's experts, and how many go to others than in full precision."""
    rows = []
    for block, figures in figures_by_block(blocks).items():
        for module, each in figures.get("experts", {}).items():
            tokens = sorted(each["tokens"])
            said = [str(block), module, str(len(tokens)), str(tokens[0])]
            said += [f"{median(tokens):.0f}", str(tokens[-1]), str(each["kept_start"])]
            rows.append([*said, "" if each["changed"] is None else percent(each["changed"])])
    return Table(
        "Experts",
        ["block", "module", "experts", *_TOKENS, "kept the start", "choices changed"],
        rows,
        "Calibration tokens of each expert under full precision. Experts of fewer than "
        "--expert_tokens keep the clipping that was searched. Choices changed: the share of "
        "tokens' experts that the full-precision model does not choose.",
    )


_TOKENS = ("fewest tokens", "median", "most")


def _improvement(linear: LinearFigures | None) -> str:
    if linear is None:
        return ""
    pair = linear["snr"]
    return f"{decibels(pair['round_to_nearest'])} → {decibels(pair['learned'])}"


def _pair(
    figures: Figures | None,
    name: Literal["loss", "cosine", "error_made"],
    words: Callable[[float | None], str],
) -> list[str]:
    if figures is None:
        return ["", ""]
    return [words(figures[name]["round_to_nearest"]), words(figures[name]["learned"])]
