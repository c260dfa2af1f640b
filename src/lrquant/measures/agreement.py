"""Agreement of next-token distributions with full precision, beside the perplexities of both."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lrquant.config.settings import setting
from lrquant.measures.measure import Metric, Scored, TextMeasure
from lrquant.measures.numbers import divergence, number, share
from lrquant.measures.rows import COLUMNS, RunResults, Table, Tile, named, table
from lrquant.runs.results import Entry, Json, Results, entries, figure, record

if TYPE_CHECKING:
    from torch import Tensor

    from lrquant.data.samples import Samples
    from lrquant.measures.scoring.divergences import Divergences
    from lrquant.measures.scoring.predictions import Predictions

_WORDS = {"kl_mean": divergence, "kl_p99": divergence}
_NOTE = (
    "KL divergence of next-token distributions from the full-precision model, in nats, and how "
    "often both prefer the same token. KL p99: what 99 % of the predictions do not exceed; of "
    "fewer than 100, the largest."
)


@dataclass(frozen=True)
class AgreementSettings:
    """The texts."""

    agreement: tuple[str, ...] = setting(
        (), "KL divergence of next-token distributions from full precision on these sets"
    )


@dataclass(frozen=True)
class AgreementScores:
    """A perplexity, and the divergences from full precision; none of full precision itself."""

    perplexity: float
    divergences: Divergences | None


class Agreement(TextMeasure[AgreementSettings, AgreementScores]):
    """Its texts have their perplexities too, of which it tells the ratio."""

    name = "agreement"
    settings = AgreementSettings
    asked_by = ("agreement",)
    order = 20
    against_full_precision = True
    metrics: ClassVar[Mapping[str, Metric]] = {
        "kl_mean": Metric("mean KL"),
        "kl_p99": Metric("KL p99"),
        "same_top": Metric("same top token"),
        "perplexity_ratio": Metric("perplexity ratio"),
    }

    def texts(self, settings: AgreementSettings) -> Sequence[str]:
        return settings.agreement

    def positions(self, predictions: Predictions) -> Sequence[Tensor]:
        if predictions.expected is None:
            return [predictions.losses]
        return [
            predictions.losses,
            predictions.expected_losses,
            predictions.divergences,
            predictions.same_top,
        ]

    def summary(self, values: Sequence[Tensor]) -> AgreementScores:
        from lrquant.measures.scoring.divergences import divergences, perplexity

        losses, *compared = values
        return AgreementScores(
            perplexity(losses), divergences(losses, *compared) if compared else None
        )

    def as_json(self, scores: AgreementScores) -> Json:
        if scores.divergences is None:
            return None
        values = dataclasses.asdict(scores.divergences)
        return {name: value for name, value in values.items() if value is not None and value != []}

    def entries(
        self, scored: Scored[Samples, AgreementScores], settings: AgreementSettings
    ) -> Results:
        plain = {variant: scores.perplexity for variant, scores in scored.scores.items()}
        results = {"perplexity": {scored.name: {**scored.about, **plain}}}
        told = {variant: self.as_json(scores) for variant, scores in scored.scores.items()}
        told = {variant: values for variant, values in told.items() if values is not None}
        against = {} if scored.against is None else {"reference": scored.against}
        if told:
            results["agreement"] = {scored.name: {**scored.about, **against, **told}}
        return results

    def log_lines(self, scored: Scored[Samples, AgreementScores], variant: str) -> Iterable[str]:
        summary = scored.scores[variant].divergences
        if summary is not None:
            error = "" if summary.kl_mean_stderr is None else f" ± {summary.kl_mean_stderr:.2g}"
            numbers = ", ".join(f"{key} {getattr(summary, key):.4g}" for key in self.metrics)
            numbers = numbers.replace(",", f"{error},", 1)
            yield f"{scored.name} agreement, {variant.replace('_', ' ')}: {numbers}"

    def rows(
        self, results: Results, labels: Mapping[str, str]
    ) -> tuple[list[str], list[list[str]]]:
        """One row a text and model; the first cell says which, and with what it should agree."""
        held_against = _held_against(results)
        rows = []
        for name, about, variants in named(results, self.name):
            against = str(variants.get("reference", "full_precision"))
            other = f", with {labels[against]}" if len(held_against) > 1 else ""
            for key in labels:
                if key in variants:
                    scores = record(variants[key])
                    cells = [_cell(metric, figure(scores.get(metric))) for metric in self.metrics]
                    error = figure(scores.get("kl_mean_stderr"))
                    cells[0] += f" ± {divergence(error)}" if cells[0] and error is not None else ""
                    rows.append([f"{name}{about}, {labels[key]}{other}", *cells])
        return [metric.words for metric in self.metrics.values()], rows

    def tables(self, results: Results, labels: Mapping[str, str]) -> list[str]:
        other = {**labels, "full_precision": "model"}  # or held against another
        head, rows = self.rows(results, other)
        against = " or ".join(labels[key] for key in _held_against(results))
        return [table([f"agreement with {against}", *head], rows)] if rows else []

    def report_tables(self, runs: Sequence[RunResults]) -> list[Table]:
        rows = []
        head: list[str] = []
        for run in runs:
            before = f"{run.name}: " if run.name else ""
            own = {key: before + label for key, label in run.labels.items()}
            head, measured = self.rows(run.results, own)
            rows += measured
        whole = Table("Agreement with full precision", ["text and model", *head], rows, _NOTE)
        return [whole, *(_along_windows(runs[0]) if len(runs) == 1 else [])]

    def tiles(self, run: RunResults) -> list[Tile]:
        tiles = []
        for text, about, variants in named(run.results, self.name)[:1]:
            scores = record(variants.get("quantized"))
            if scores.get("kl_mean") is not None:
                same = f"same top token {share(figure(scores['same_top']))}"
                mean = divergence(figure(scores["kl_mean"]))
                error = figure(scores.get("kl_mean_stderr"))
                mean += f" ± {divergence(error)}" if error is not None else ""
                tiles.append(Tile(f"mean KL, {text}{about}", mean, same))
        return tiles

    def missing(self, results: Results) -> list[str]:
        if any(True for _ in entries(results, self.name)):
            return []
        return ["agreement with full precision: lrquant evaluate RUN --agreement wikitext2"]


def _cell(metric: str, value: float | str | None) -> str:
    if metric == "perplexity_ratio" and isinstance(value, float) and value >= 10:
        return number(value)
    return _WORDS.get(metric, share)(value)


def _held_against(results: Results) -> list[str]:
    told = {e.get("reference", "full_precision") for _, e in entries(results, "agreement")}
    return [key for key in COLUMNS if key in told]


def _along_windows(run: RunResults) -> list[Table]:
    """How agreement goes along the window: a table a text."""
    tables = []
    for text, about, variants in named(run.results, "agreement"):
        along = {key: _spans(record(variants.get(key))) for key in run.labels}
        along = {key: spans for key, spans in along.items() if spans}
        if along:
            title = f"Agreement along the window, {text}{about}"
            tables.append(_along(title, along, run.labels))
    return tables


def _spans(scores: Entry) -> list[Entry]:
    positions = scores.get("positions")
    return [record(span) for span in positions] if isinstance(positions, list) else []


_ALONG: dict[str, tuple[str, Callable[[float | str | None], str]]] = {
    "kl_mean": ("mean KL", divergence),
    "same_top": ("same top token", share),
}


def _along(title: str, along: Mapping[str, list[Entry]], labels: Mapping[str, str]) -> Table:
    """Rows of spans of the window, a column for each number and model."""
    rows = [
        [
            _span(span),
            *(
                words(figure(along[key][row].get(kind)))
                for kind, (_, words) in _ALONG.items()
                for key in along
            ),
        ]
        for row, span in enumerate(next(iter(along.values())))
    ]
    heads = [f"{what}, {labels[key]}" for what, _ in _ALONG.values() for key in along]
    note = "Of predictions from so many tokens of their window."
    return Table(title, ["tokens read", *heads], rows, note)


def _span(span: Entry) -> str:
    first, last = span["first"], span["last"]
    return str(first) if first == last else f"{first}–{last}"


MEASURE = Agreement()
