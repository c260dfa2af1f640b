"""Results of a command's subjects: each measure with its conditions, then those of a base."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from lrquant.blocks.plan import Plan
from lrquant.config.config import Config
from lrquant.config.groups import Learning
from lrquant.data.prompts import Reader
from lrquant.files.whole import JsonObject
from lrquant.learn.identity import Computation, dtype_name, environment
from lrquant.measures.evaluation.evaluation import Evaluation, Reading
from lrquant.measures.subjects.subject import (
    BASE,
    RunSubject,
    Subject,
    open_reference,
    open_subject,
)
from lrquant.model.model import Model
from lrquant.runs.folder import RunFolder
from lrquant.runs.progress import Progress
from lrquant.runs.results import VERDICT, Json, Results, beside, of_base


def add_measures(
    measured: Iterable[Results], fresh: Results, folder: RunFolder | None
) -> dict[str, Json]:
    """Add measures to a command's results, and to the folder's when each is done.

    Returns all results, without the verdict of an earlier command.
    """
    results: dict[str, Json] = dict(fresh) if folder is None else folder.results()
    for each in measured:
        results = fresh = beside(fresh, each)
        if folder is not None:
            results = folder.add_results(fresh)
    return {name: value for name, value in results.items() if name in fresh or name != VERDICT}


def _told(
    measured: Iterable[Results], progress: Progress, about: Callable[[], Results]
) -> Iterator[Results]:
    """Measures with what is to be known of each, when it is done."""
    for each in measured:
        progress.measured(dict(each))
        yield {**about(), **each}


def measure_run(
    subject: RunSubject, evaluation: Evaluation, reading: Reading, progress: Progress
) -> Iterator[Results]:
    """Measures of the run that a command is about."""
    config = evaluation.config
    source = source_of(subject.reader)
    measured = evaluation.measure(subject, reading, progress)
    return _told(measured, progress, lambda: _conditions(config, subject) | source)


def measure_target(target: str, evaluation: Evaluation, progress: Progress) -> Iterator[Results]:
    """Measures of a checkpoint or model, which is let go of when they are done."""
    config = evaluation.config
    reference = open_reference(target, config)
    subject = open_subject(target, config, team=evaluation.team)
    source = source_of((reference or subject).reader)

    def about() -> Results:
        return _conditions(subject.settings or config, subject) | {"model": target} | source

    reading = evaluation.read(subject.reader)
    measured = evaluation.measure(subject, reading, progress, reference)
    for each in _told(measured, progress, about):
        if reference is not None and isinstance(config.compare, str):
            each = of_base(each, _in_words(config.compare, reference))
        yield each


def measure_base(evaluation: Evaluation, progress: Progress) -> Iterator[Results]:
    """Measures of what `compare` names, if it names anything."""
    name = evaluation.config.compare
    if isinstance(name, str):
        subject = open_subject(name, evaluation.config, BASE, evaluation.team)
        reading = evaluation.read(subject.reader)
        for measured in _told(evaluation.measure(subject, reading, progress), progress, dict):
            yield of_base(measured, _in_words(name, subject))


def _conditions(config: Config, computation: Computation) -> JsonObject:
    """What a reader needs to repeat the numbers."""
    plan, learning = Plan.of(config.quantizing), config.group(Learning)
    return environment(config.model, plan, learning, config.seed, computation)


def _in_words(name: str, subject: Subject) -> str:
    return f"{name} in {dtype_name(subject.dtype)}"


def source_of(reader: Reader) -> dict[str, str]:
    """What "full precision" is, where the model's own weights had been quantised."""
    origin = reader.source.unpacked_from() if isinstance(reader, Model) else ""
    return {"unpacked_from": origin} if origin else {}
