"""One command's evaluation: every measure that it asks for, on every variant of its subjects."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial

from lrquant.blocks.head import tokens_at_once
from lrquant.config.config import Config
from lrquant.config.groups import MeasureSettings, Sources
from lrquant.data.prompts import Reader
from lrquant.data.samples import Samples
from lrquant.learn.identity import dtype_name
from lrquant.measures.choice import AnyMeasure, AnyModule, AnyText, module_measures, text_measures
from lrquant.measures.evaluation.texts import read_texts, texts_of
from lrquant.measures.measure import Scored, WholeModel, items_of_text
from lrquant.measures.scoring.predictions import score
from lrquant.measures.subjects.reference import require_same_tokens
from lrquant.measures.subjects.subject import (
    ADAPTED,
    FULL_PRECISION,
    ROUND_TO_NEAREST,
    Subject,
    own_windows,
)
from lrquant.runs.folder import RunFolder
from lrquant.runs.progress import Progress
from lrquant.runs.results import Results, entries, kinds, named_entries
from lrquant.team.launch import Launch
from lrquant.team.team import ALONE, Team

logger = logging.getLogger("lrquant")


@dataclass
class Board:
    """A measure of whole models, with its settings, its sets, and the scores of each so far."""

    measure: AnyModule
    settings: object
    sets: Mapping[str, object]
    scores: dict[str, dict[str, object]] = field(default_factory=dict)

    def scored(self, name: str) -> Scored[object, object]:
        """One set's scores."""
        asked = self.sets[name]
        return Scored(name, asked, self.measure.about(asked), self.scores.setdefault(name, {}))

    def entries(self, name: str) -> Results:
        """What results.json says of one set."""
        return self.measure.entries(self.scored(name), self.settings)


@dataclass(frozen=True)
class Reading:
    """What one model is measured on."""

    texts: Mapping[str, Samples]
    boards: list[Board]


class Evaluation:
    """The measures that the settings ask for.

    Sets that need no model are read when it is made, before any model is opened; their scores of
    all subjects stand side by side.  What a measure keeps of a variant goes to `folder`, if
    one is set.
    """

    def __init__(self, config: Config, folder: RunFolder | None = None, team: Team = ALONE) -> None:
        self.config, self.folder, self.team = config, folder, team
        self.measuring, self.sources = config.measuring, config.group(Sources)
        self._alone = [
            Board(measure, settings, measure.read_alone(settings, self.sources))
            for measure, settings in self._of_modules()
        ]

    def read(self, reader: Reader) -> Reading:
        """What is measured of a model.  Raises LRQuantError before any hour is spent."""
        boards = [
            Board(measure, settings, measure.read(settings, self.sources, reader))
            for measure, settings in self._of_modules()
        ]
        return Reading(self._texts(reader), boards)

    def _texts(self, reader: Reader) -> dict[str, Samples]:
        return self.team.first(lambda: read_texts(texts_of(self.measuring), self.sources, reader))

    def _of_modules(self) -> list[tuple[AnyModule, object]]:
        """The measures of whole models, each with its settings: the first member's of a team."""
        return _asked(self.measuring) if self.team.rank == 0 else []

    def measure(
        self,
        subject: Subject,
        reading: Reading,
        progress: Progress,
        reference: Subject | None = None,
    ) -> Iterator[Results]:
        """Measures of a subject as results.json has them, each when it is done.

        So none is lost with another.  With a `reference`, another model in full precision, measures
        that are held against full precision are held against that.  What the first of a team has
        alone it measures alone.
        """
        if subject.of_first and self.team.size > 1:
            if self.team.rank == 0:
                yield from self._alone_of_team().measure(subject, reading, progress, reference)
            return
        others: Mapping[str, Samples] = {}
        if reference is not None:
            others = self._texts(reference.reader)
        for name, text in reading.texts.items():
            measures = self._of_text(name)
            comparing = [measure for measure in measures if measure.against_full_precision]
            if reference is not None and comparing:
                require_same_tokens(text, others[name], comparing[0].asked_by[0])
            against = reference if comparing else None
            yield from self._measure_text(measures, subject, text, progress, against)
        yield from self._measure_modules(subject, reading, progress)

    def _alone_of_team(self) -> Evaluation:
        """The same evaluation by one process."""
        alone = copy.copy(self)
        alone.team = ALONE
        return alone

    def _of_text(self, name: str) -> list[AnyText]:
        """The measures that ask for a text."""
        return [m for m in text_measures() if name in m.texts(self.measuring[m.settings])]

    def _measure_text(
        self,
        measures: list[AnyText],
        subject: Subject,
        text: Samples,
        progress: Progress,
        reference: Subject | None,
    ) -> Iterator[Results]:
        adapted = subject.adapt(text, progress)
        if adapted is not None:
            outcome = {**items_of_text(text), "adapted": adapted[0], **adapted[1]}
            yield {"test_time_adaptation": {text.name: outcome}}
        compared = any(measure.against_full_precision for measure in measures)
        columns = self._columns(subject, compared, reference)
        columns += [(ADAPTED, subject)] if adapted is not None else []
        logger.info("measuring on %s", text.description)
        scored = score_text(measures, columns, text, progress, held=compared, team=self.team)
        about: dict[str, str] = {}
        if reference is not None and reference.dtype != subject.dtype:
            about["reference_precision"] = dtype_name(reference.dtype)
        if adapted is not None:
            about["adapted"] = adapted[0]
        against = None if reference is None else reference.own
        for measure, scores in zip(measures, scored, strict=True):
            settings = self.measuring[measure.settings]
            yield _with(measure.entries(replace(scores, against=against), settings), about)

    def _columns(
        self, subject: Subject, compared: bool, reference: Subject | None
    ) -> list[tuple[str, Subject]]:
        """The variants of a text in order, what others are held against first."""
        if reference is not None:
            return [(reference.own, reference), (subject.own, subject)]
        wanted = {FULL_PRECISION: compared or self.config.compare is True}
        wanted[ROUND_TO_NEAREST] = self.config.compare is True
        beside = [name for name in subject.beside if wanted[name]]
        return [(name, subject) for name in (*beside, subject.own)]

    def _measure_modules(
        self, subject: Subject, reading: Reading, progress: Progress
    ) -> Iterator[Results]:
        boards = [board for board in (*self._alone, *reading.boards) if board.sets]
        boards.sort(key=lambda board: board.measure.order)
        alone = [board.measure.name for board in boards if not board.measure.shared]
        if alone and self.team.size > 1:
            names = ", ".join(dict.fromkeys(alone))
            logger.info("%s: measured by the first of %d processes", names, self.team.size)
        for variant in (subject.own, *subject.beside):
            wanted = [board for board in boards if self._wants(board.measure, subject, variant)]
            shared = self._shared(wanted, subject)
            team = self.team if shared else ALONE
            if self.team.rank:
                self._assist(shared, subject, variant)
            elif wanted:
                whole = WholeModel(subject.module(variant, team), subject.reader, variant, team)
                yield from self._score_boards(wanted, whole, progress)
                del whole  # before the next one is made
        for board in boards:
            if board.measure.against_full_precision:
                for name in board.sets:
                    yield board.entries(name)

    def _score_boards(
        self, boards: list[Board], whole: WholeModel, progress: Progress
    ) -> Iterator[Results]:
        """The entries of the sets that are held against nothing, each when it is scored."""
        for board in boards:
            for name in board.sets:
                self._score(board, name, whole, progress)
                if not board.measure.against_full_precision:
                    yield board.entries(name)

    def _shared(self, boards: list[Board], subject: Subject) -> list[str]:
        """The measures that all of a team take of a variant, as often as each has sets.

        None where a member has no room for the model: the first then has the devices of all.
        """
        names = self.team.first(partial(_shared_sets, boards))
        if self.team.size == 1:
            return names
        together = Launch.of_environment().local_size
        if all(self.team.each(subject.fits(together))):
            return names
        if names:
            told = ", ".join(dict.fromkeys(names)), self.team.size
            logger.info("%s: the model is too large to be whole in each of %d processes", *told)
        return []

    def _assist(self, names: list[str], subject: Subject, variant: str) -> None:
        """Another member's part of scoring a variant on sets of these measures."""
        if not names:
            return
        asked = {measure.name: (measure, settings) for measure, settings in _asked(self.measuring)}
        whole = WholeModel(subject.module(variant, self.team), subject.reader, variant, self.team)
        for measure, settings in (asked[name] for name in names):
            measure.assist(whole, settings, self.sources)

    def _wants(self, measure: AnyMeasure, subject: Subject, variant: str) -> bool:
        """Whether a measure of whole models is taken of a variant."""
        if variant == FULL_PRECISION and measure.against_full_precision:
            return True
        return variant == subject.own or self.config.compare is True

    def _score(self, board: Board, name: str, model: WholeModel, progress: Progress) -> None:
        """Score one variant on one set, keep what is to be kept of it, and say so."""
        measure, scored = board.measure, board.scored(name)
        how = board.settings, self.sources
        scores = measure.score(name, scored.asked, model, *how, progress)
        board.scores[name][model.variant] = scores
        if self.folder is not None:
            date = datetime.now().isoformat(timespec="seconds").replace(":", "-")
            for file, text in measure.files(model.variant, scores).items():
                self.folder.write_text(f"tasks/{file}_{date}.json", text)
        for line in measure.log_lines(board.scored(name), model.variant):
            logger.info("%s", line)


def _shared_sets(boards: list[Board]) -> list[str]:
    """The measures that all of a team take, each as often as it has sets."""
    return [board.measure.name for board in boards if board.measure.shared for _ in board.sets]


def _asked(measuring: MeasureSettings) -> list[tuple[AnyModule, object]]:
    """The measures of whole models that the settings ask for, each with its own."""
    pairs = [(measure, measuring[measure.settings]) for measure in module_measures()]
    return [(measure, settings) for measure, settings in pairs if measure.asked(settings)]


def score_text(
    measures: list[AnyText],
    columns: list[tuple[str, Subject]],
    text: Samples,
    progress: Progress,
    *,
    held: bool = False,
    team: Team = ALONE,
) -> list[Scored[Samples, object]]:
    """Scores of several measures on one text, of each column.

    With `held`, the others are held against the first one, whose final hidden states alone are
    kept; the columns of one subject share its head.  Of a `team` each member computes some windows.
    """
    own, counts = own_windows(text, team)
    feed = own.feed if counts else own.feed.only([])
    tables: list[dict[str, object]] = [{} for _ in measures]
    scored = [Scored(text.name, text, items_of_text(text), table) for table in tables]
    heads = {id(subject): subject.head() for _, subject in columns}
    first, kept = columns[0][1], None
    vocabulary = first.reader.skeleton.config.get_text_config().vocab_size
    at_once = tokens_at_once(first.device, vocabulary)
    for index, (column, subject) in enumerate(columns):
        states = subject.final_states(column, own, progress)
        head, other = heads[id(subject)], heads[id(first)]
        scores = score(measures, head, states, feed, kept, other, at_once, team)
        kept = states if held and not index else kept
        del states  # before those of the next column are made
        for measure, told, table, each in zip(measures, scored, tables, scores, strict=True):
            table[column] = each
            for line in measure.log_lines(told, column):
                logger.info("%s", line)
    return scored


def _with(results: Results, about: Mapping[str, str]) -> Results:
    """Results each of whose entries says this too."""
    if not about:
        return results
    return {
        kind: named_entries({name: {**entry, **about} for name, entry in entries(results, kind)})
        for kind in kinds(results)
    }
