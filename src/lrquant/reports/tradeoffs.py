"""Pictures of what quality costs: perplexity against size, and against the time of learning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from lrquant.reports.pictures import FAINT, SERIES, Picture, drawing, logarithmic, plain_name
from lrquant.reports.values import Contents
from lrquant.runs.results import figure, record

_GIGA, _MEGA = 1e9, 1e6
_SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Point:
    """A model's perplexity and what it costs; `nearest` says that nothing of it is learned."""

    name: str
    colour: str
    cost: float
    perplexity: float
    nearest: bool = False


@dataclass(frozen=True)
class _Measured:
    """The perplexities of one of the compared on a text."""

    name: str
    colour: str
    contents: Contents
    scores: Contents


def tradeoff_pictures(runs: Sequence[Contents], names: Sequence[str]) -> list[Picture]:
    """For each text, of those that were measured on the same windows of it: size, then time."""
    groups: dict[tuple[str, str], list[_Measured]] = {}
    for index, (contents, name) in enumerate(zip(runs, names, strict=True)):
        for text, scores in record(contents["results"].get("perplexity")).items():
            each = _Measured(name, SERIES[index % len(SERIES)], contents, dict(record(scores)))
            groups.setdefault((text, str(each.scores.get("sha256"))), []).append(each)
    pictures: list[Picture] = []
    for (text, _), measured in groups.items():
        pictures += _by_size(f"size-{len(pictures)}", text, measured)
        pictures += _by_time(f"time-{len(pictures)}", text, measured)
    return pictures


def front(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in both cost and perplexity, from the cheapest on."""
    best: list[Point] = []
    for point in sorted(points, key=lambda each: (each.cost, each.perplexity)):
        if not best or point.perplexity < best[-1].perplexity:
            best.append(point)
    return best


def _by_size(name: str, text: str, measured: Sequence[_Measured]) -> list[Picture]:
    points: list[Point] = []
    for each in measured:
        own, nearest = _perplexity(each, "quantized"), _perplexity(each, "round_to_nearest")
        full = _perplexity(each, "full_precision")
        size, before = _size(each.contents), each.contents["run"]["sizes"].get("bfloat16_bytes")
        if size and own is None and full is not None:
            points.append(Point(each.name, each.colour, size, full))
        if size and own is not None:
            points.append(Point(each.name, each.colour, size, own))
        if size and nearest is not None:
            points.append(Point("round-to-nearest", each.colour, size, nearest, nearest=True))
        if before and own is not None and full is not None:
            label = f"{_model(each.contents)} in bfloat16"
            points.append(Point(label, FAINT, float(before), full))
    points = list(dict.fromkeys(points))
    if len({point.cost for point in points}) < 2:
        return []
    unit, scale = ("GB", _GIGA) if max(p.cost for p in points) >= _GIGA else ("MB", _MEGA)
    with drawing(1, height=2.6 + 0.17 * len(points)) as canvas:
        (axis,) = canvas.axes
        best = front(points)
        axis.plot([p.cost / scale for p in best], [p.perplexity for p in best], color=FAINT, lw=0.8)
        _scatter(axis, points, scale)
        logarithmic(axis, "perplexity")
        axis.set_xlim(left=0)
        axis.set_xlabel(f"size of the checkpoint ({unit})")
        canvas.figure.legend(loc="outside upper left")
        words = "Lower and further left is better; the line joins what nothing else here beats in "
        words += "both. Hollow: round-to-nearest, of the same size." + _models(measured)
        return [canvas.picture(name, f"Quality against size, {text}", words)]


def _by_time(name: str, text: str, measured: Sequence[_Measured]) -> list[Picture]:
    points = []
    for each in measured:
        seconds, own = each.contents["run"].get("seconds"), _perplexity(each, "quantized")
        if seconds and own is not None:
            points.append(Point(each.name, each.colour, float(seconds), own))
    if len({point.cost for point in points}) < 2:
        return []
    longest = max(point.cost for point in points)
    unit = [unit for unit, length in _SECONDS.items() if unit == "s" or 2 * length <= longest][-1]
    with drawing(1, height=2.3 + 0.17 * len(points)) as canvas:
        (axis,) = canvas.axes
        _scatter(axis, points, _SECONDS[unit])
        logarithmic(axis, "perplexity")
        axis.set_xlim(left=0)
        axis.set_xlabel(f"time of learning ({unit})")
        canvas.figure.legend(loc="outside upper left")
        words = "Lower and further left is better." + _models(measured)
        machines = {each.contents["run"].get("device") for each in measured} - {None}
        words += " Not all on the same kind of device." if len(machines) > 1 else ""
        return [canvas.picture(name, f"Quality against time, {text}", words)]


def _scatter(axis: Axes, points: Sequence[Point], scale: float) -> None:
    for point in points:
        axis.scatter(
            [point.cost / scale],
            [point.perplexity],
            s=34,
            zorder=3,
            facecolors="none" if point.nearest else point.colour,
            edgecolors=point.colour,
            label=None if point.nearest else plain_name(point.name),
        )


def _perplexity(measured: _Measured, variant: str) -> float | None:
    value = figure(measured.scores.get(variant))
    return value if isinstance(value, float) else None


def _size(contents: Contents) -> float | None:
    fits = contents["fits"]
    return fits["formats"].get(fits["written"], {}).get("bytes")


def _model(contents: Contents) -> str:
    return str(contents["run"]["model"]).rstrip("/").rpartition("/")[2]


def _models(measured: Sequence[_Measured]) -> str:
    several = len({model_of(each.contents) for each in measured}) > 1
    return " They are of different models." if several else ""


def model_of(contents: Contents) -> str:
    """What tells one model from another: its weights' hash, or where that is not known its name."""
    return str(contents["run"]["weights"] or contents["run"]["model"])
