"""Pictures of a run's numbers by block: errors, losses, learned parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator

from lrquant.config.config import ingredient_kinds
from lrquant.ingredients.ingredient import Chart, Ingredient
from lrquant.reports.pictures import (
    CARRIED,
    DEPTHS,
    ERRORS,
    FAINT,
    INK,
    LEARNED,
    NEAREST,
    Picture,
    drawing,
    logarithmic,
)
from lrquant.reports.values import Block, Figures, LinearFigures, figures_by_block, linears_of

_NUMBERED = 12  # blocks whose ratios are written into the cells of a map
_NO_ERROR = 1e-10  # of a signal's energy: what rounding in float32 leaves
_PANEL = 1.15  # inches of a small panel


def error_pictures(blocks: Sequence[Block]) -> list[Picture]:
    """Where the error is made: by block, and by linear."""
    figures = figures_by_block(blocks)
    if not figures:
        return []
    return [_errors(figures), _cosines(figures), *(_map(figures, *kind) for kind in _MAPS)]


def by_block(axis: Axes) -> None:
    """Label the horizontal axis with whole blocks."""
    axis.set_xlabel("block")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def series(values: Sequence[float | None]) -> list[float]:
    """Values to draw, with gaps where there is none."""
    return [numpy.nan if value is None else value for value in values]


def positive(values: Sequence[float | None]) -> list[float]:
    """Ratios for a logarithmic axis, with gaps where there is none, or no error to speak of."""
    return [value if value > _NO_ERROR else numpy.nan for value in series(values)]


def _errors(by_number: dict[int, Figures]) -> Picture:
    figures = list(by_number.values())
    with drawing(1) as canvas:
        (axis,) = canvas.axes
        by_block(axis)
        lines = {
            "made, round-to-nearest": (
                [f["error_made"]["round_to_nearest"] for f in figures],
                NEAREST,
            ),
            "made, learned": ([f["error_made"]["learned"] for f in figures], LEARNED),
            "carried in": ([f["error_carried"] for f in figures], CARRIED),
            "in all, learned": ([f["error"]["learned"] for f in figures], INK),
        }
        for label, (values, colour) in lines.items():
            dash = ":" if colour == INK else "-"
            axis.plot(
                list(by_number), positive(values), dash, color=colour, label=label, marker="."
            )
        logarithmic(axis, "error energy / output's")
        canvas.figure.legend(loc="outside upper left", ncols=2, columnspacing=1)
        return canvas.picture(
            "errors",
            "Error made in each block, and carried in",
            "Made: the quantised block against the full-precision one on the same quantised input. "
            "Carried in: the full-precision block on that input against its own full-precision "
            f"input. In all: the two together. Over {figures[0]['tokens']} tokens.",
        )


def _cosines(figures: dict[int, Figures]) -> Picture:
    cosines = [each["cosine"] for each in figures.values()]
    with drawing(1) as canvas:
        (axis,) = canvas.axes
        by_block(axis)
        for values, label, colour in (
            ([pair["round_to_nearest"] for pair in cosines], "round-to-nearest", NEAREST),
            ([pair["learned"] for pair in cosines], "learned", LEARNED),
        ):
            distance = [1 - value for value in series(values)]
            axis.plot(list(figures), positive(distance), color=colour, label=label, marker=".")
        logarithmic(axis, "1 − cosine")
        canvas.figure.legend(loc="outside upper left", ncols=2)
        return canvas.picture(
            "cosines",
            "Direction of the blocks' outputs",
            "One less the mean cosine of each token's output with the full-precision model's; "
            "lower is better. Both on the quantised input, so with the error carried in.",
        )


_MAPS: tuple[tuple[Literal["own_snr", "snr"], str, str], ...] = (
    ("own_snr", "Error that each linear adds", "of what each linear's own weights and its input's "
     "quantizer add, after learning"),
    ("snr", "Error of each linear's output", "of each linear's output, after learning, against the "
     "full-precision block on the same block input"),
)  # fmt: skip


def _map(
    figures: dict[int, Figures], key: Literal["own_snr", "snr"], title: str, words: str
) -> Picture:
    by_linear = [each["linears"] for each in figures.values()]
    linears = linears_of(figures.values())
    ratios = [series([_learned(each.get(linear), key) for each in by_linear]) for linear in linears]
    with drawing(1, height=0.9 + 0.2 * len(linears)) as canvas:
        (axis,) = canvas.axes
        by_block(axis)
        colours = numpy.ma.masked_invalid(numpy.array(ratios))
        shown = axis.pcolormesh(
            numpy.arange(len(figures) + 1) - 0.5, numpy.arange(len(linears) + 1) - 0.5, colours,
            cmap=ERRORS, rasterized=True,
        )  # fmt: skip
        axis.set_yticks(range(len(linears)), [short(linear) for linear in linears])
        axis.invert_yaxis()
        axis.spines[:].set_visible(False)
        numbers, few = list(figures), _few(len(figures))
        axis.set_xticks(few, [str(numbers[index]) for index in few])
        bar = canvas.figure.colorbar(shown, ax=axis, pad=0.02)
        bar.set_label("dB (red: much error)")
        bar.outline.set_visible(False)
        return canvas.picture(
            key.replace("_", ""),
            title,
            f"Signal-to-noise ratio in dB {words}; the lower, the more error. Empty where "
            "there is no error, or no such linear in the block.",
        )


def _learned(linear: LinearFigures | None, key: Literal["own_snr", "snr"]) -> float | None:
    return None if linear is None else linear[key]["learned"]


def short(linear: str) -> str:
    """q_proj of self_attn.q_proj."""
    return linear.rpartition(".")[2]


def _few(count: int) -> list[int]:
    """Up to about eight indices of `count`, evenly spaced."""
    return list(range(0, count, -(-count // 8)))


def learning_pictures(blocks: Sequence[Block], of: int) -> list[Picture]:
    """Loss curves, one a block, of a model `of` so many."""
    blocks = [block for block in blocks if block["epoch_losses"]]
    if not blocks:
        return []
    held = all(block["held_losses"] for block in blocks)
    with drawing(1) as canvas:
        (axis,) = canvas.axes
        depth = ScalarMappable(Normalize(0, max(of - 1, 1)), DEPTHS)
        for block in blocks:
            colour = depth.to_rgba(numpy.array(block["block"]))
            losses = block["held_losses"] if held else block["epoch_losses"]
            curve = [value / block["initial_loss"] for value in (block["initial_loss"], *losses)]
            axis.plot(range(len(curve)), curve, color=colour, linewidth=0.9)
            if block["best_epoch"] is not None and block["best_epoch"] < len(curve):
                kept = block["best_epoch"]
                axis.plot(kept, curve[kept], ".", color=colour)
        axis.axhline(1, color=FAINT, linewidth=0.6)
        axis.set_xlabel("epoch")
        axis.set_ylabel("loss / loss at the start")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        bar = canvas.figure.colorbar(depth, ax=axis, pad=0.02)
        bar.set_label("block")
        bar.outline.set_visible(False)
        what = (
            "over all samples with the parameters held still after an epoch; the dot is the epoch "
            "that was kept"
            if held
            else "as the mean of an epoch's steps"
        )
        caption = f"Loss of each block {what}. All {len(blocks)} learned blocks are drawn."
        return [canvas.picture("losses", "Loss of each block while learning", caption)]


def _kinds() -> dict[str, Chart]:
    """Every chart of parameters that an ingredient brings."""
    kinds = (kind for kind in ingredient_kinds() if issubclass(kind, Ingredient))
    return {name: chart for kind in kinds for name, chart in kind.charts.items()}


def parameter_pictures(blocks: Sequence[Block]) -> list[Picture]:
    """Distributions of the learned parameters by block."""
    pictures = []
    order = linears_of(figures_by_block(blocks).values())
    for kind, (title, words, scale) in _kinds().items():
        named = {owner for block in blocks for owner in block["parameters"].get(kind, ())}
        owners = sorted(named, key=lambda owner: (owner in order and order.index(owner) + 1, owner))
        if owners:
            pictures.append(_bands(blocks, kind, owners, title, words, scale))
    return pictures


def _bands(
    blocks: Sequence[Block],
    kind: str,
    owners: list[str],
    title: str,
    words: str,
    scale: str,
) -> Picture:
    columns = 1 if len(owners) == 1 else 2
    rows = -(-len(owners) // columns)
    with drawing(rows, columns, 0.6 + _PANEL * rows, sharex=True) as canvas:
        for axis, owner in zip(canvas.axes, owners, strict=False):
            there = [block for block in blocks if owner in block["parameters"].get(kind, {})]
            low, quarter, middle, upper, high = zip(
                *(block["parameters"][kind][owner] for block in there), strict=True
            )
            numbers = [block["block"] for block in there]
            axis.fill_between(numbers, low, high, color=LEARNED, alpha=0.18, linewidth=0)
            axis.fill_between(numbers, quarter, upper, color=LEARNED, alpha=0.35, linewidth=0)
            axis.plot(numbers, middle, color=LEARNED, marker=".", markersize=3)
            if scale == "log":
                logarithmic(axis, "")
            axis.set_title(short(owner))
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5, min_n_ticks=1))
        for axis in canvas.axes[len(owners) :]:
            axis.set_visible(False)
        canvas.figure.supxlabel("block", fontsize=8)
        words += ", on a log scale" if scale == "log" else ""
        caption = (
            f"{words}: median, middle half (dark band) and 1st to 99th percentile (light "
            "band) of all values, none left out."
        )
        return canvas.picture(kind, title, caption)
