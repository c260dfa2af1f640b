"""A measure: the settings that ask for it, what it reads and computes, and its rows in tables.

A declaration is imported whenever settings are, so its file needs neither torch nor transformers
before it measures: what does is imported in the functions that use it.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from lrquant.config.declarations import Declaration
from lrquant.measures.numbers import plain, share, spread
from lrquant.measures.rows import SPREAD_NOTE, RunResults, Table, Tile, columns_in, named, table
from lrquant.measures.shares import counted
from lrquant.runs.results import Entry, Json, Results, figure, record
from lrquant.team.team import ALONE

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from lrquant.config.groups import Sources
    from lrquant.data.prompts import Reader
    from lrquant.data.samples import Samples
    from lrquant.measures.scoring.predictions import Predictions
    from lrquant.runs.progress import Progress
    from lrquant.team.team import Team

S = TypeVar("S")  # its settings
A = TypeVar("A")  # a set as it is read
R = TypeVar("R")  # its scores of one variant
LAST = 100  # where a measure stands in tables that does not say


@dataclass(frozen=True)
class Metric:
    """A number of a measure in words; `spread` says whether it has a standard error beside it."""

    words: str
    spread: bool = True


@dataclass(frozen=True)
class WholeModel:
    """A variant of a subject as a transformers model in memory, and what makes its inputs.

    Every process of a `team` has the same one.
    """

    module: PreTrainedModel
    reader: Reader
    variant: str
    team: Team = ALONE


@dataclass(frozen=True)
class Scored(Generic[A, R]):
    """The scores of one set so far, by variant.

    `about` says of which items they are.  `against` names the column of another model that they
    are held against, None where that is the full precision of the same.
    """

    name: str
    asked: A
    about: Entry
    scores: Mapping[str, R]
    against: str | None = None


class Measure(Declaration, ABC, Generic[S, A, R]):
    """What measures a model; `MEASURE` in a file of this folder, or of another package, is one.

    `settings` is a frozen dataclass of what a user may say, made with `setting`; `asked_by` names
    its fields that ask for the measure, `of_one_command` others that hold for one command alone:
    both are forgotten where a finished run is measured anew.  `by_default` are its settings where a
    command that can only measure asks for no measure at all.
    `kinds` are its names in results.json, `name` by default.  `order` says where its tables stand.
    `metrics` are the numbers of an entry, in the order of their rows; `heading` begins the table
    and `column` heads its values in a report.
    """

    name: ClassVar[str]
    settings: type[S]
    asked_by: ClassVar[tuple[str, ...]]
    of_one_command: ClassVar[tuple[str, ...]] = ()
    by_default: ClassVar[Mapping[str, object]] = {}
    order: ClassVar[int] = LAST
    against_full_precision: ClassVar[bool] = False
    metrics: ClassVar[Mapping[str, Metric]] = {}
    heading: ClassVar[str] = ""
    column: ClassVar[str] = "value"
    unnamed: ClassVar[str] = ""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Its names in results.json."""
        return (self.name,)

    def asked(self, settings: S) -> bool:
        """Whether its settings ask for it."""
        return any(getattr(settings, name) for name in self.asked_by)

    def reads(self, settings: S) -> list[str]:
        """What its settings name: texts, files and folders, none of which is ever written over."""
        values = [getattr(settings, name) for name in self.asked_by]
        return [
            str(name)
            for value in values
            if not isinstance(value, bool)
            for name in (value if isinstance(value, tuple) else (value,))
            if name
        ]

    def check(self, settings: S, compared: bool) -> None:
        """Refuse, before anything is read, settings that contradict each other (LRQuantError).

        `compared` says whether another model is measured beside.  It is called whether the measure
        is asked for or not.
        """

    @abstractmethod
    def described(self, asked: A) -> str:
        """What was read, in words."""

    def log_lines(self, scored: Scored[A, R], variant: str) -> Iterable[str]:
        """What the log says when a variant has been scored."""
        scores = record(self.as_json(scored.scores[variant])) or {"": 0}
        numbers = [(key, scores[key], scores.get(f"{key}_stderr")) for key in self.metrics]
        told = [
            f"{key} {spread(value, error) if isinstance(error, float) else plain(value)}"
            for key, value, error in numbers
            if isinstance(value, float)
        ]
        where = scored.name or self.unnamed
        yield f"{self.name} {where}, {variant.replace('_', ' ')}: {', '.join(told)}"

    def as_json(self, scores: R) -> Json:
        """One variant's scores as results.json has them: a number, or an object of numbers."""
        values = dataclasses.asdict(scores)  # type: ignore[call-overload]
        return {key: value for key, value in values.items() if value is not None}

    def entries(self, scored: Scored[A, R], settings: S) -> Results:
        """What results.json says of one set, by kind."""
        told = {variant: self.as_json(scores) for variant, scores in scored.scores.items()}
        entry = {**scored.about, **told}
        return {self.name: {scored.name: entry} if scored.name else entry}

    def rows(
        self, results: Results, labels: Mapping[str, str]
    ) -> tuple[list[str], list[list[str]]]:
        """Columns of models, and rows of which the first cell is a set and a metric."""
        sets = named(results, self.name)
        shown = columns_in(labels, [entry for *_, entry in sets])
        rows = []
        for name, about, entry in sets:
            for key, metric in self.metrics.items():
                cells = [_cell(record(entry.get(variant)), key, metric) for variant in shown]
                if any(cells):
                    what = f"{name or self.unnamed}, {metric.words}{about}"
                    rows.append([what, *(cell or "-" for cell in cells)])
        return list(shown.values()), rows

    def tables(self, results: Results, labels: Mapping[str, str]) -> list[str]:
        """Its part of the printed table of results."""
        head, rows = self.rows(results, labels)
        heading = self.heading or self.name
        return [table([f"{heading}, {results['scheme']}", *head], rows)] if rows else []

    def report_tables(self, runs: Sequence[RunResults]) -> list[Table]:
        """Its tables in the report of a run, or in the comparison of several."""
        rows = []
        for run in runs:
            head, measured = self.rows(run.results, run.labels)
            before = f"{run.name}: " if run.name else ""
            rows += [
                [f"{before}{what}, {model}", value]
                for what, *values in measured
                for model, value in zip(head, values, strict=True)
            ]
        title = (self.heading or self.name).capitalize()
        return [Table(title, ["set and model", self.column], rows, SPREAD_NOTE)] if rows else []

    def tiles(self, run: RunResults) -> list[Tile]:
        """Its numbers at the top of a run's report."""
        return []

    def missing(self, results: Results) -> list[str]:
        """What a report of these results lacks of it, with the command that brings it."""
        return []


def _cell(scores: Entry, key: str, metric: Metric) -> str:
    value, error = figure(scores.get(key)), figure(scores.get(f"{key}_stderr"))
    if value is None:
        return ""
    return spread(value, error) if metric.spread else share(value)


class TextMeasure(Measure[S, "Samples", R]):
    """A measure of next-token distributions along texts, streamed block by block.

    Each variant's final hidden states of a text are computed once for all measures of it.  Of one
    that is held `against_full_precision`, full precision comes first and is what others are held
    against.
    """

    @abstractmethod
    def texts(self, settings: S) -> Sequence[str]:
        """Names of the texts to measure."""

    def needs(self, settings: S) -> bool:
        """Whether a text that is not to be had is refused, not left out."""
        return True

    @abstractmethod
    def positions(self, predictions: Predictions) -> Sequence[Tensor]:
        """One value a position for each of several quantities, (tokens,) each."""

    @abstractmethod
    def summary(self, values: Sequence[Tensor]) -> R:
        """The scores of what `positions` returned of all positions, float64 on the CPU.

        Each is (windows, positions), or (positions,) where samples have several lengths.
        """

    def described(self, asked: Samples) -> str:
        return asked.description


class ModuleMeasure(Measure[S, A, R]):
    """A measure of a whole transformers model in memory.

    A set is read by one of two functions: `read_alone` where it is of no one model, which is then
    before any is opened, and the scores of all models of a command stand side by side; `read` where
    it becomes one model's inputs.  Both return the sets by name; one of no name stands alone.

    Of several processes the first alone reads sets and calls `score`.  Where a measure is `shared`
    the others call `assist` with the same model, and both speak by its team.
    """

    shared: ClassVar[bool] = False

    def set_by_set(self, settings: S) -> Iterable[S]:
        """The same settings set by set, so that a check tells of each."""
        return [settings]

    def read_alone(self, settings: S, sources: Sources) -> Mapping[str, A]:
        """Sets that need no model.  Raises LRQuantError for what is not to be had."""
        return {}

    def read(self, settings: S, sources: Sources, reader: Reader) -> Mapping[str, A]:
        """Sets as inputs of a model.  Raises LRQuantError for what is not to be had."""
        return {}

    def about(self, asked: A) -> Entry:
        """Of which items the scores of a set are, as results.json has it."""
        return {}

    @abstractmethod
    def score(
        self,
        name: str,
        asked: A,
        model: WholeModel,
        settings: S,
        sources: Sources,
        progress: Progress,
    ) -> R:
        """The scores of one variant of a model on the set `name`."""

    def assist(self, model: WholeModel, settings: S, sources: Sources) -> None:
        """Another process's part of `score`, on one set."""

    def files(self, variant: str, scores: R) -> Mapping[str, str]:
        """Texts to keep in the run folder under `tasks/`, by their names."""
        return {}


def items_of_text(text: Samples) -> Entry:
    """Of what a measure of a text is, as results.json has it."""
    unit = "conversations"
    if text.prompts is None:
        unit = f"windows of {text.ids.shape[1]} tokens"
    items = counted(len(text.feed), text.whole, unit)
    return {"text": text.description, "sha256": text.sha256, "items": items}
