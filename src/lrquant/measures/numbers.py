"""Numbers written for people: one function for each kind, small differences kept."""

from __future__ import annotations

import math

NOT_FINITE = ("inf", "-inf", "nan")  # how report.json writes numbers that JSON does not have
_DIGITS = 8  # at most, after the point of a share


def number(value: float | str | None) -> str:
    """A perplexity or loss: four digits at least, and all before the point up to 1e9.

    Values that are not finite are said ("inf", "nan"), whether they come as numbers or as words.
    """
    if value is None or isinstance(value, str):
        return value or ""
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 1e9:
        return f"{value:.4e}"
    if abs(value) >= 1e4:
        return f"{value:.0f}"
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:#.4g}"


def divergence(value: float | str | None) -> str:
    """A KL divergence: four digits after the point, three that mean something where it is small."""
    if value is None or isinstance(value, str):
        return value or ""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    return f"{value:.4f}" if abs(value) >= 0.1 else f"{value:#.3g}"


def share(value: float | str | None) -> str:
    """A share, cosine or ratio near 1: four digits after the point, more beside 0 and 1.

    So what is not exactly 0 or 1 is not written as such.
    """
    if value is None or isinstance(value, str):
        return value or ""
    digits = 4
    while digits < _DIGITS and value not in (0, 1) and round(value, digits) in (0, 1):
        digits += 1
    return f"{value:.{digits}f}"


def plain(value: float) -> str:
    """Up to 1 as a share, above as a perplexity."""
    return share(value) if abs(value) <= 1 else number(value)


def spread(value: float | str, error: float | str | None, *, signed: bool = False) -> str:
    """A mean, or a difference with its sign, ± its standard error.

    "?" where the items tell of none: a single one, all alike, or a metric of which it is not told.
    """
    if isinstance(value, str):
        return value
    mean = plain(value)
    mean = f"+{mean}" if signed and value >= 0 else mean
    if not isinstance(error, float) or not math.isfinite(error) or error == 0:
        return f"{mean} ± ?"
    return f"{mean} ± {error:.4f}" if error >= 5e-5 else f"{mean} ± {error:.1e}"


def percent(value: float | None) -> str:
    """A ratio as per cent, three digits."""
    if value is None:
        return ""
    digits = f"{100 * value:#.3g}".rstrip(".") if value else "0"
    return f"{digits}\N{NO-BREAK SPACE}%"


def decibels(value: float | None) -> str:
    """One digit; a linear that adds no error has no ratio."""
    return "–" if value is None else f"{value:.1f}"


def duration(seconds: float) -> str:
    """1 h 02 min, 3 min 04 s, 5.6 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
