"""Pictures of a report: the look that they share, and how a figure becomes inline SVG.

Text stays text and colours are variables of the page's style sheet, so that a picture follows the
page on a phone, in the dark and on paper.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullLocator,
)

INK, FAINT, LEARNED, NEAREST, CARRIED = "#1c1d1f", "#8c8d8f", "#2c6dd1", "#d1722c", "#6c6d6f"
VARIABLES = {
    **{INK: "--ink", FAINT: "--faint", LEARNED: "--learned", NEAREST: "--nearest"},
    **{CARRIED: "--carried"},
}
# from the first block to the last, and from much error to little: seen on white and on black
DEPTHS = LinearSegmentedColormap.from_list("depths", ["#2f7fe0", "#2f9e68", "#c98a1b", "#d1493f"])
ERRORS = LinearSegmentedColormap.from_list("errors", ["#c62f2f", "#e8934a", "#ecd9a0", "#5b9bd5"])
SERIES = ("#2c6dd1", "#d1722c", "#2f9e68", "#a24fc4", "#c43f5f", "#8a7a1f", "#1f97a8", "#777777")
_WIDE = 30.0  # times from the smallest to the largest value, for labels at powers of ten
WIDTH = 4.0  # inches; 72 points each are the units of the SVG: about the pixels of a phone
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lrquant",
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.3,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "figure.constrained_layout.use": True,
    "savefig.transparent": True,
    "image.interpolation": "none",
}
_IDENTITY = re.compile(r'\sid="([^"]*)"')
_REFERENCE = re.compile(r'(xlink:href="|url\()#([^")]+)')
_FAMILY = re.compile(r"font-family: [^;\"]*;? ?|(?<=px) '[^;\"]*(?=[;\"])")


@dataclass(frozen=True)
class Picture:
    """Inline SVG with what it shows, in a few words and in a caption."""

    title: str
    caption: str
    svg: str


@contextmanager
def drawing(
    rows: int,
    columns: int = 1,
    height: float = 2.6,
    sharex: bool = False,
    height_ratios: Sequence[float] | None = None,
) -> Iterator[_Canvas]:
    """A canvas of `rows` x `columns` axes, `height` inches in all, in the report's look."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=(WIDTH, height))
        axes = figure.subplots(
            rows, columns, squeeze=False, sharex=sharex, height_ratios=height_ratios
        )
        yield _Canvas(figure, [axis for row in axes for axis in row])


@dataclass
class _Canvas:
    """A figure under way and its axes, row by row."""

    figure: Figure
    axes: Sequence[Axes]

    def picture(self, name: str, title: str, caption: str) -> Picture:
        """The finished picture; `name`, of letters, is its own on the page."""
        self.figure.draw_without_rendering()  # lays out once; saving would do it twice
        self.figure.set_layout_engine("none")
        buffer = io.StringIO()
        unknown = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        self.figure.savefig(buffer, format="svg", metadata=unknown)
        return Picture(title, caption, inline(buffer.getvalue(), name.replace(" ", "-"), title))


def logarithmic(axes: Axes, label: str, *, horizontal: bool = False) -> None:
    """Make an axis of what is drawn logarithmic, and say so, with few numbers that keep apart.

    Without a `label` the picture's words are to say it.
    """
    axis: Axis = axes.xaxis if horizontal else axes.yaxis
    if horizontal:
        axes.set_xscale("log")
        low, high = axes.get_xlim()
    else:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
    wide = low > 0 and high / low > _WIDE
    axis.set_major_locator(LogLocator(numticks=5) if wide else MaxNLocator(4))
    axis.set_minor_locator(NullLocator())
    axis.set_label_text(f"{label} (log scale)" if label else "")
    axis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:g}"))


def inline(svg: str, name: str, title: str) -> str:
    """An SVG file's text as an element of a page: own ids, no fixed size, the page's colours."""
    svg = svg[svg.index("<svg") :]
    used = {match[2] for match in _REFERENCE.finditer(svg)}
    svg = _IDENTITY.sub(lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", svg)
    svg = _REFERENCE.sub(lambda match: f"{match[1]}#{name}-{match[2]}", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = _FAMILY.sub("", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    head, rest = svg.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    label = title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return f'{head} role="img" aria-label="{label}">{rest}'


def plain_name(name: str) -> str:
    """A name as matplotlib is to draw it: not as mathematics, and of some length at most."""
    name = name if len(name) <= 32 else name[:15] + "…" + name[-16:]
    return name.replace("$", r"\$").lstrip("_")
