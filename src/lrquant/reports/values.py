"""The values of a report, as report.json holds them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NotRequired, TypedDict

from lrquant.files.whole import JsonObject

Contents = JsonObject  # the whole of report.json, or what stands under its `run` or `results`


class Pair(TypedDict):
    """A figure of a block or linear, by what it is computed with; None where it is not finite."""

    round_to_nearest: float | None
    learned: float | None


class LinearFigures(TypedDict):
    """Signal-to-noise ratios in dB of a linear's output, and of what it adds itself."""

    snr: Pair
    own_snr: Pair


class Figures(TypedDict):
    """Figures of a block, as `BlockDiagnostics` takes them."""

    samples: int
    tokens: int
    linear_tokens: int
    picture_channels: dict[str, int]
    loss: Pair
    cosine: Pair
    error: Pair
    error_made: Pair
    error_carried: float | None
    linears: dict[str, LinearFigures]
    experts: NotRequired[dict[str, ExpertFigures]]


class ExpertFigures(TypedDict):
    """Of a module of experts: the tokens of each, how many were not learned, what share of tokens'
    experts full precision does not choose."""

    tokens: list[int]
    kept_start: int
    changed: float | None


class Block(TypedDict):
    """A learned block: its record, its figures if they were taken, quantiles of its parameters."""

    block: int
    initial_loss: float
    final_loss: float
    epoch_losses: list[float]
    held_losses: list[float]
    best_epoch: int | None
    seconds: float
    peak_memory_bytes: int
    non_finite: list[str]
    figures: Figures | None
    parameters: dict[str, dict[str, list[float]]]


class WorstLinear(TypedDict):
    """One of the linears that add most error themselves, in dB."""

    block: int
    linear: str
    own_snr: float
    own_snr_round_to_nearest: float | None
    snr: float | None


class WorstBlock(TypedDict):
    """One of the blocks that add most error to their output, of the output's energy."""

    block: int
    error_made: float


class Run(TypedDict):
    """What a run is, as far as its facts are told; a run of an earlier version may lack some."""

    model: str
    model_type: str
    weights: str
    blocks: int
    learned_blocks: int
    scheme_in_words: str
    tower: str
    method: str
    calibration: str
    data: Mapping[str, str]
    statistics: Sequence[str]
    seed: int
    precision: str
    device: str | None
    threads: int | None
    cpu: str | None
    gpu: str | None
    unpacked_from: str
    versions: Mapping[str, str]
    seconds: float
    peak_memory_bytes: int
    parameter_bytes: int
    command: str


def figures_by_block(blocks: Sequence[Block]) -> dict[int, Figures]:
    """The figures of the blocks of which there are some."""
    return {block["block"]: block["figures"] for block in blocks if block["figures"]}


def spans_of(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] -> "blocks 0-2, 5"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    words = [str(low) if low == high else f"{low}-{high}" for low, high in spans]
    return ("blocks " if len(words) > 1 or "-" in words[0] else "block ") + ", ".join(words)


def linears_of(figures: Iterable[Figures]) -> list[str]:
    """The linears of these blocks, each once, in their order: a block may lack some of them."""
    return list(dict.fromkeys(linear for each in figures for linear in each["linears"]))
