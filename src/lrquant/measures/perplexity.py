"""Perplexity on texts: that of transformers and plain cross-entropy on the field's own windows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lrquant.config.settings import setting
from lrquant.measures.measure import Scored, TextMeasure
from lrquant.measures.numbers import number
from lrquant.measures.rows import (
    ADAPTED_NOTE,
    COLUMNS,
    RunResults,
    Table,
    Tile,
    beside,
    columns_in,
    named,
)
from lrquant.runs.results import Entry, Results, entries, figure

if TYPE_CHECKING:
    from torch import Tensor

    from lrquant.data.samples import Samples
    from lrquant.measures.scoring.predictions import Predictions

_TILES = 2  # texts whose perplexities stand at the top of a report
PUBLISHED_SETS = ("wikitext2", "ptb", "c4", "ptb-new", "c4-new")


@dataclass(frozen=True)
class PerplexitySettings:
    """The texts."""

    eval_ppl: bool = setting(False, "perplexity on every published set that can be had")
    ppl: tuple[str, ...] = setting((), "perplexity on these sets")


@dataclass(frozen=True)
class PerplexityScores:
    """``exp`` of the mean loss, with its standard error over the windows where there are some."""

    perplexity: float
    stderr: float | None


class Perplexity(TextMeasure[PerplexitySettings, PerplexityScores]):
    """Sets asked for by name must be there; of the published five, those that can be had do."""

    name = "perplexity"
    settings = PerplexitySettings
    asked_by = ("eval_ppl", "ppl")
    by_default: ClassVar[Mapping[str, object]] = {"ppl": ("wikitext2",)}
    order = 10

    def texts(self, settings: PerplexitySettings) -> Sequence[str]:
        return settings.ppl or (PUBLISHED_SETS if settings.eval_ppl else ())

    def needs(self, settings: PerplexitySettings) -> bool:
        return bool(settings.ppl)

    def positions(self, predictions: Predictions) -> Sequence[Tensor]:
        return [predictions.losses]

    def summary(self, values: Sequence[Tensor]) -> PerplexityScores:
        from lrquant.measures.scoring.divergences import perplexity, perplexity_error

        (losses,) = values
        return PerplexityScores(perplexity(losses), perplexity_error(losses))

    def as_json(self, scores: PerplexityScores) -> float:
        return scores.perplexity

    def log_lines(self, scored: Scored[Samples, PerplexityScores], variant: str) -> Iterable[str]:
        scores = scored.scores[variant]
        error = "" if scores.stderr is None else f" ± {scores.stderr:.2g}"
        words = variant.replace("_", " ")
        yield f"{scored.name} perplexity, {words}: {scores.perplexity:.4f}{error}"

    def rows(
        self, results: Results, labels: Mapping[str, str]
    ) -> tuple[list[str], list[list[str]]]:
        measured = named(results, self.name)
        shown = {key: label for key, label in labels.items() if any(key in e for *_, e in measured)}
        rows = [
            [name + about, *(number(figure(entry.get(key))) for key in shown)]
            for name, about, entry in measured
        ]
        return list(shown.values()), rows

    def report_tables(self, runs: Sequence[RunResults]) -> list[Table]:
        return [_of_one(runs[0])] if len(runs) == 1 else _by_text(runs)

    def tiles(self, run: RunResults) -> list[Tile]:
        tiles = []
        for text, about, scores in named(run.results, self.name)[:_TILES]:
            values = {key: number(figure(scores.get(key))) for key in run.labels}
            own = values.get("quantized") or "–"
            tiles.append(Tile(f"perplexity, {text}{about}", own, beside(run.labels, values)))
        return tiles

    def missing(self, results: Results) -> list[str]:
        measured = dict(entries(results, self.name))
        whole = {
            text
            for text, scores in entries(results, self.name)
            if {"full_precision", "round_to_nearest"} <= scores.keys()
        }
        if not measured:
            return ["perplexity: lrquant evaluate RUN --ppl wikitext2 --compare"]
        if measured.keys() - whole:
            return [
                "full precision or round-to-nearest beside a perplexity: lrquant evaluate RUN "
                "--compare"
            ]
        return []


def _of_one(run: RunResults) -> Table:
    """All texts of one run."""
    measured = named(run.results, "perplexity")
    shown = columns_in(run.labels, [scores for *_, scores in measured])
    rows = [
        [name + about, *(number(figure(scores.get(key))) for key in shown)]
        for name, about, scores in measured
    ]
    notes = [f"{name}: {_of_what(scores)}." for name, _, scores in measured if "text" in scores]
    note = " ".join([*dict.fromkeys(notes), *_adapted_note(shown)])
    return Table("Perplexity", ["text", *shown.values()], rows, note)


def _of_what(scores: Entry) -> str:
    """Which windows a measure is of, and how a column of it was made otherwise."""
    said = [str(scores.get("text", "not measured"))]
    if "reference_precision" in scores:
        said.append(f"full precision in {scores['reference_precision']}")
    if "base_model" in scores:
        said.append(f"base: {scores['base_model']}")
    if "adapted" in scores:
        said.append(f"adapted: {scores['adapted']}")
    return "; ".join(said)


def _by_text(runs: Sequence[RunResults]) -> list[Table]:
    """One table a text; each row says over which windows, and of which model if they differ."""
    alike = len({run.weights for run in runs}) == 1
    measured = [named(run.results, "perplexity") for run in runs]
    tables = []
    for text in dict.fromkeys(name for own in measured for name, *_ in own):
        rows: list[tuple[RunResults, str, Entry]] = []
        for run, own in zip(runs, measured, strict=True):
            of_text = [(about, scores) for name, about, scores in own if name == text]
            rows += [(run, run.name + about, e) for about, e in of_text or [("", {})]]
        shown = columns_in({**COLUMNS, "quantized": "learned"}, [scores for *_, scores in rows])
        cells = [
            [
                name,
                *(number(figure(scores.get(key))) for key in shown),
                _of_what(scores),
                *([] if alike else [run.model]),
            ]
            for run, name, scores in rows
        ]
        head = ["run", *shown.values(), "windows", *([] if alike else ["model"])]
        notes = _adapted_note(shown)
        if not alike:
            notes += ["The runs are of different models: full precision is each run's own."]
        tables.append(Table(f"Perplexity on {text}", head, cells, " ".join(notes)))
    return tables


def _adapted_note(shown: Mapping[str, str]) -> list[str]:
    return [ADAPTED_NOTE] if "test_time_adapted" in shown else []


MEASURE = Perplexity()
