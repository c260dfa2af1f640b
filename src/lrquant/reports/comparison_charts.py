"""Pictures of several runs in one: errors by block, perplexities."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lrquant.reports.charts import by_block, positive
from lrquant.reports.pictures import FAINT, SERIES, Picture, drawing, logarithmic, plain_name
from lrquant.reports.tradeoffs import model_of, tradeoff_pictures
from lrquant.reports.values import Contents, Figures, figures_by_block

_LINES = ("-", "--", ":")


def comparison_pictures(runs: Sequence[Contents], names: Sequence[str]) -> list[Picture]:
    """Perplexities, what they cost, then each block's error and direction, a line a run."""
    pictures = [*_perplexities(runs, names), *tradeoff_pictures(runs, names)]
    figures = [figures_by_block(contents["blocks"]) for contents in runs]
    if any(figures):
        pictures += [_by_block(figures, names, *what) for what in _QUANTITIES]
    return pictures


_QUANTITIES: tuple[tuple[str, str, str, str, Callable[[Figures], float | None]], ...] = (
    (
        "made",
        "Error made in each block",
        "error energy / output's",
        "The learned block against the full-precision one on the same quantised input.",
        lambda figures: figures["error_made"]["learned"],
    ),
    (
        "total",
        "Error after each block",
        "error energy / output's",
        "The learned model's hidden states against the full-precision model's.",
        lambda figures: figures["error"]["learned"],
    ),
    (
        "direction",
        "Direction of the blocks' outputs",
        "1 − cosine",
        "One less the mean cosine of each token's output with the full-precision model's.",
        lambda figures: _distance(figures["cosine"]["learned"]),
    ),
)


def _distance(cosine: float | None) -> float | None:
    return None if cosine is None else 1 - cosine


def _by_block(
    runs: Sequence[dict[int, Figures]],
    names: Sequence[str],
    name: str,
    title: str,
    unit: str,
    words: str,
    value: Callable[[Figures], float | None],
) -> Picture:
    with drawing(1, height=2.4 + 0.2 * len(runs)) as canvas:
        (axis,) = canvas.axes
        for index, (figures, run) in enumerate(zip(runs, names, strict=True)):
            if not figures:
                continue
            by_block(axis)
            axis.plot(
                list(figures),
                positive([value(each) for each in figures.values()]),
                color=SERIES[index % len(SERIES)],
                linestyle=_LINES[index // len(SERIES) % len(_LINES)],
                label=plain_name(run),
                marker=".",
            )
        logarithmic(axis, unit)
        canvas.figure.legend(loc="outside upper left")
        return canvas.picture(
            name, title, f"{words} Each run over its own samples; lower is better."
        )


def _perplexities(runs: Sequence[Contents], names: Sequence[str]) -> list[Picture]:
    """One picture for each text on which more than one run was measured."""
    texts = dict.fromkeys(t for contents in runs for t in contents["results"].get("perplexity", {}))
    pictures: list[Picture] = []
    for text in texts:
        rows = [
            (name, contents, contents["results"]["perplexity"][text])
            for name, contents in zip(names, runs, strict=True)
            if isinstance(
                contents["results"].get("perplexity", {}).get(text, {}).get("quantized"), float
            )
        ]
        if len(rows) > 1:
            pictures.append(_perplexity(f"perplexity-{len(pictures)}", text, rows, names))
    return pictures


def _perplexity(
    name: str,
    text: str,
    rows: Sequence[tuple[str, Contents, Contents]],
    names: Sequence[str],
) -> Picture:
    """A point a run; full precision as one line if it is one number, else a dash at each run."""
    full = [scores.get("full_precision") for *_, scores in rows]
    measured = [value for value in full if isinstance(value, float)]
    one = len({_of_what(contents, scores) for _, contents, scores in rows}) == 1
    one = one and len(set(measured)) == 1
    with drawing(1, height=0.8 + 0.25 * len(rows)) as canvas:
        (axis,) = canvas.axes
        values = [scores["quantized"] for *_, scores in rows]
        colours = [SERIES[names.index(run) % len(SERIES)] for run, *_ in rows]
        axis.scatter(values, range(len(values)), color=colours, s=30, zorder=3)
        if one:
            axis.axvline(measured[0], color=FAINT, linewidth=0.8, linestyle="--")
        else:
            lines = [index for index, value in enumerate(full) if isinstance(value, float)]
            axis.scatter(measured, lines, marker="|", color=FAINT, s=90, linewidth=1.2)
        axis.set_yticks(range(len(values)), [plain_name(run) for run, *_ in rows])
        axis.set_ylim(len(values) - 0.5, -0.5)
        logarithmic(axis, "perplexity", horizontal=True)
        return canvas.picture(name, f"Perplexity on {text}", _words(rows, measured, one))


def _words(rows: Sequence[tuple[str, Contents, Contents]], full: list[float], one: bool) -> str:
    """What the points are, and what must not be compared."""
    words = ["Lower is better."]
    if one:
        words.append("Dashed: full precision, of the same model on the same windows in all runs.")
    elif full:
        words.append("Upright dashes: the full precision of each run that has measured it.")
    if len({model_of(contents) for _, contents, _ in rows}) > 1:
        words.append("The runs are of different models.")
    if len({_windows(scores) for *_, scores in rows}) > 1:
        words.append("Not all on the same windows of it: see the table.")
    elif len({_of_what(contents, scores) for _, contents, scores in rows}) > 1:
        words.append("Not all measured in the same way: see the runs.")
    return " ".join(words)


def _windows(scores: Contents) -> tuple[str | None, str | None]:
    return scores.get("text"), scores.get("sha256")


def _of_what(contents: Contents, scores: Contents) -> tuple[object, ...]:
    """What two runs must share for their full precision to be one number."""
    run = contents["run"]
    made_with = [scores.get("measured_with", {}).get(key, run.get(key)) for key in _CONDITIONS]
    return (model_of(contents), *_windows(scores), *made_with)


_CONDITIONS = ("precision", "device")
