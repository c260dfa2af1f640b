"""Pictures of several runs in one: errors by block, perplexities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lrquant.report.charts import by_block, diagnosed, positive
from lrquant.report.pictures import FAINT, SERIES, Picture, drawing, logarithmic

_LINES = ("-", "--", ":")


def comparison_pictures(runs: Sequence[dict[str, Any]], names: Sequence[str]) -> list[Picture]:
    """Perplexities, then each block's error, direction and seconds, a line a run."""
    pictures = _perplexities(runs, names)
    if any(map(diagnosed, runs)):
        pictures += [_by_block(runs, names, *what) for what in _QUANTITIES]
    return pictures


_QUANTITIES: tuple[tuple[str, str, str, str, Callable[[dict[str, Any]], float | None]], ...] = (
    (
        "made",
        "Error made in each block",
        "error energy / output's",
        "The learned block against the full-precision one on the same quantised input.",
        lambda block: block["figures"]["error_made"]["learned"],
    ),
    (
        "total",
        "Error after each block",
        "error energy / output's",
        "The learned model's hidden states against the full-precision model's.",
        lambda block: block["figures"]["error"]["learned"],
    ),
    (
        "direction",
        "Direction of the blocks' outputs",
        "1 − cosine",
        "One less the mean cosine of each token's output with the full-precision model's.",
        lambda block: _distance(block["figures"]["cosine"]["learned"]),
    ),
)


def _distance(cosine: float | None) -> float | None:
    return None if cosine is None else 1 - cosine


def _by_block(
    runs: Sequence[dict[str, Any]],
    names: Sequence[str],
    name: str,
    title: str,
    unit: str,
    words: str,
    value: Callable[[dict[str, Any]], float | None],
) -> Picture:
    with drawing(1, height=2.4 + 0.2 * len(runs)) as canvas:
        (axis,) = canvas.axes
        for index, (contents, run) in enumerate(zip(runs, names, strict=True)):
            blocks = diagnosed(contents)
            if not blocks:
                continue
            places = by_block(axis, blocks)
            axis.plot(
                places,
                positive([value(block) for block in blocks]),
                color=SERIES[index % len(SERIES)],
                linestyle=_LINES[index // len(SERIES) % len(_LINES)],
                label=_plain(run),
                marker=".",
            )
        logarithmic(axis)
        axis.set_ylabel(unit)
        canvas.figure.legend(loc="outside upper left")
        return canvas.picture(
            name, title, f"{words} Each run over its own samples; lower is better."
        )


def _perplexities(runs: Sequence[dict[str, Any]], names: Sequence[str]) -> list[Picture]:
    """One picture for each text on which more than one run was measured."""
    texts = dict.fromkeys(t for contents in runs for t in contents["results"].get("perplexity", {}))
    pictures = []
    for index, text in enumerate(texts):
        scores = [contents["results"].get("perplexity", {}).get(text, {}) for contents in runs]
        measured = [
            (name, each["quantized"], each.get("full_precision"))
            for name, each in zip(names, scores, strict=True)
            if each.get("quantized") is not None
        ]
        if len(measured) < 2:
            continue
        with drawing(1, height=0.8 + 0.25 * len(measured)) as canvas:
            (axis,) = canvas.axes
            values = [value for _, value, _ in measured]
            colours = [SERIES[names.index(name) % len(SERIES)] for name, _, _ in measured]
            axis.scatter(values, range(len(values)), color=colours, s=30, zorder=3)
            full = {value for _, _, value in measured if value is not None}
            for each in full:
                axis.axvline(each, color=FAINT, linewidth=0.8, linestyle="--")
            axis.set_yticks(range(len(values)), [_plain(name) for name, _, _ in measured])
            axis.set_ylim(len(values) - 0.5, -0.5)
            logarithmic(axis, horizontal=True)
            axis.set_xlabel("perplexity")
            words = " Dashed: full precision." if full else ""
            alike = {each.get("text") for each in scores if each} == {scores[0].get("text")}
            warning = "" if alike else " Not all on the same windows of it: see the table."
            caption = f"Lower is better.{words}{warning}"
            pictures.append(canvas.picture(f"perplexity-{index}", f"Perplexity on {text}", caption))
    return pictures


def _plain(name: str) -> str:
    """A name as matplotlib is to draw it: not as mathematics, and of some length at most."""
    name = name if len(name) <= 32 else name[:15] + "…" + name[-16:]
    return name.replace("$", r"\$").lstrip("_")
