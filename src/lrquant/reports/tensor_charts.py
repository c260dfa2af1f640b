"""Pictures of tensors: activations before and after the transformation, weights, codes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy
import torch
from matplotlib.colors import LogNorm

from lrquant.learn.diagnostics import VARIANTS, WEIGHT_BINS, WEIGHT_DEVIATIONS, run_lengths
from lrquant.measures.numbers import number, percent
from lrquant.reports.charts import short
from lrquant.reports.pictures import LEARNED, NEAREST, SERIES, Picture, drawing, logarithmic
from lrquant.reports.values import Block, Figures, figures_by_block, linears_of
from lrquant.runs.folder import RunFolder

_ACTIVATION_PICTURES = 6
_SMALLEST = 1e-6  # of the largest magnitude; smaller ones look alike
_PANEL = 1.0


def activation_pictures(blocks: Sequence[Block], folder: RunFolder) -> list[Picture]:
    """For each kind of input, the block whose channels differed most before learning."""
    chosen: dict[str, tuple[float, int]] = {}
    figures = figures_by_block(blocks)
    for block, each in figures.items():
        tensors = _tensors(folder, block)
        for linear in each["picture_channels"]:
            channels = tensors[f"inputs.{linear}.before"].float().amax(0)
            chosen[linear] = max(chosen.get(linear, (-1.0, 0)), (_spread(channels), block))
    return [
        _activations(folder, block, linear, spread, figures[block])
        for linear, (spread, block) in list(chosen.items())[:_ACTIVATION_PICTURES]
    ]


def _activations(
    folder: RunFolder, block: int, linear: str, spread: float, figures: Figures
) -> Picture:
    tensors = _tensors(folder, block)
    pair = [tensors[f"inputs.{linear}.{when}"].float().numpy() for when in ("before", "after")]
    tokens = figures["tokens"] // figures["samples"]
    channels = figures["picture_channels"][linear]
    largest = max(float(values.max()) for values in pair) or 1.0
    dim = min(float(numpy.quantile(values, 0.05)) for values in pair)
    norm = LogNorm(max(dim, largest * _SMALLEST), largest, clip=True)
    with drawing(3, height=4.4, sharex=True, height_ratios=(1, 1, 0.8)) as canvas:
        *maps, below = canvas.axes
        for axis, values, when in zip(maps, pair, ("before", "after"), strict=True):
            shown = axis.imshow(
                values, norm=norm, cmap="inferno", aspect="auto", extent=(0, channels, tokens, 0)
            )
            axis.set_title(when)
            axis.set_ylabel("token")
        bar = canvas.figure.colorbar(shown, ax=maps, pad=0.02)
        bar.set_label("magnitude (log scale)")
        bar.minorticks_off()
        bar.outline.set_visible(False)
        edges = numpy.linspace(0, channels, pair[0].shape[1] + 1)
        for values, when, colour in zip(pair, ("before", "after"), (NEAREST, LEARNED), strict=True):
            below.stairs(values.max(0), edges, color=colour, label=when, linewidth=0.9)
        logarithmic(below, "largest")
        below.set_xlabel("channel")
        below.legend(loc="lower right", bbox_to_anchor=(1, 0.95), ncols=2)
        after = _spread(torch.from_numpy(pair[1]).amax(0))
        run = run_lengths(tokens, channels)
        cell = (
            "Nothing is down-sampled"
            if run == (1, 1)
            else f"A cell is the largest of {run[0]} × {run[1]} (tokens × channels)"
        )
        return canvas.picture(
            "activations-" + "-".join(linear.split(".")),
            f"What {short(linear)} of block {block} reads",
            f"Magnitudes of the first sample's input to {linear}, in the model as it is (before) "
            "and in the learned block, before any quantizer (after), on the same hidden "
            f"states. {cell}. Of all blocks, this one's channels differ most before: the largest "
            f"is {number(spread)} times the median one, and {number(after)} times after.",
        )


def _spread(channels: torch.Tensor) -> float:
    """How many times the median channel the largest one is."""
    return float(channels.max() / channels.median().clamp(min=1e-12))


def weight_pictures(blocks: Sequence[Block], folder: RunFolder) -> list[Picture]:
    """Histograms of weights and of codes, over all blocks of which there are figures."""
    figures = figures_by_block(blocks)
    if not figures:
        return []
    linears = linears_of(figures.values())
    sums: dict[str, torch.Tensor] = {}
    for block in figures:
        for name, tensor in _tensors(folder, block).items():
            if name.startswith(("weights.", "codes.")):
                sums[name] = _added(sums[name], tensor) if name in sums else tensor
    pictures = [_weights(sums, linears, len(figures))]
    coded = [linear for linear in linears if f"codes.{linear}.learned" in sums]
    if coded:
        pictures.append(_codes(sums, coded, len(figures)))
    return pictures


def _added(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Counts together; of grids of several bits those of the finer one, by its share of codes."""
    if len(one) == len(other):
        return one + other
    fine, coarse = (one, other) if len(one) > len(other) else (other, one)
    places = (torch.arange(len(coarse)) * len(fine)) // len(coarse)
    return fine.index_add(0, places, coarse)


def _weights(sums: dict[str, torch.Tensor], linears: list[str], blocks: int) -> Picture:
    edges = numpy.linspace(-WEIGHT_DEVIATIONS, WEIGHT_DEVIATIONS, WEIGHT_BINS + 1)
    with drawing(1, height=3.0) as canvas:
        (axis,) = canvas.axes
        for index, linear in enumerate(linears):
            counts = sums[f"weights.{linear}"].double().numpy()
            share = counts / counts.sum()
            share[share == 0] = numpy.nan
            centres = (edges[:-1] + edges[1:]) / 2
            axis.plot(centres, share, color=SERIES[index % len(SERIES)], label=short(linear), lw=1)
        logarithmic(axis, "share of weights")
        axis.set_xlabel("weight / standard deviation of its linear")
        canvas.figure.legend(loc="outside upper left", ncols=3, columnspacing=1)
        return canvas.picture(
            "weights",
            "Weights of the model",
            f"All weights of these linears in {blocks} blocks, each in standard deviations of its "
            "own linear; the outermost bins hold everything beyond six.",
        )


def _codes(sums: dict[str, torch.Tensor], linears: list[str], blocks: int) -> Picture:
    rows = -(-len(linears) // 2)
    with drawing(rows, 2, 0.7 + _PANEL * rows) as canvas:
        for axis, linear in zip(canvas.axes, linears, strict=False):
            for variant, colour, label in zip(
                VARIANTS, (NEAREST, LEARNED), ("round-to-nearest", "learned"), strict=True
            ):
                counts = sums[f"codes.{linear}.{variant}"].double().numpy()
                axis.stairs(
                    counts / counts.sum(),
                    numpy.arange(len(counts) + 1) - 0.5,
                    color=colour,
                    label=label,
                    fill=variant == "learned",
                    alpha=0.6 if variant == "learned" else 1.0,
                )
            axis.set_title(short(linear))
        for axis in canvas.axes[len(linears) :]:
            axis.set_visible(False)
        outer = [_outermost(sums, linears, variant) for variant in VARIANTS]
        handles, labels = canvas.axes[0].get_legend_handles_labels()
        canvas.figure.legend(handles, labels, loc="outside upper left", ncols=2)
        canvas.figure.supxlabel("code", fontsize=8)
        canvas.figure.supylabel("share", fontsize=8)
        return canvas.picture(
            "code-counts",
            "Codes of the quantised weights",
            f"How often each code is used, over all weights of these linears in {blocks} blocks "
            "(where a linear has several numbers of bits, in steps of the finest). In the two "
            f"outermost codes are {outer[0]} of these weights at round-to-nearest and {outer[1]} "
            "as learned.",
        )


def _outermost(sums: dict[str, torch.Tensor], linears: list[str], variant: str) -> str:
    counts = [sums[f"codes.{linear}.{variant}"].double() for linear in linears]
    outer = sum(float(each[0] + each[-1]) for each in counts)
    return percent(outer / sum(float(each.sum()) for each in counts))


def _tensors(folder: RunFolder, block: int) -> dict[str, torch.Tensor]:
    diagnostics = folder.load_diagnostics(block)
    return {} if diagnostics is None else diagnostics[1]
