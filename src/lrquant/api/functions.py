"""The functions of the package: what each command does, in Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrquant.api.asked import asked_data, asked_settings, named_model, shown_progress
from lrquant.api.docstrings import with_settings
from lrquant.api.run import Run, measure_finished, written
from lrquant.api.shown import Shown
from lrquant.config.choices import SettingDict
from lrquant.config.groups import Computing
from lrquant.config.scheme import Scheme
from lrquant.errors import LRQuantError
from lrquant.files.whole import JsonObject
from lrquant.measures.subjects.checkpoint import load_checkpoint
from lrquant.model.model import Model
from lrquant.model.reading import Processor
from lrquant.pipeline import evaluate as measure_target
from lrquant.pipeline import run
from lrquant.preflight.checks import preflight
from lrquant.preflight.findings import Preflight
from lrquant.reports.inspection import inspect_folder
from lrquant.reports.preflight import preflight_text
from lrquant.reports.writing import write_comparison, write_report
from lrquant.runs.claims import held
from lrquant.runs.folder import RunFolder, is_run
from lrquant.runs.progress import Progress


@with_settings
def quantize(
    model: str | Path | PreTrainedModel,
    scheme: str | Scheme | None = None,
    *,
    calibration: object = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    processor: Processor | None = None,
    progress: Progress | bool | None = None,
    **settings: Any,
) -> Run:
    """Learn a quantised model and measure it.

    `model` is a local folder, hub name, GGUF file or a transformers model in memory, then with its
    `tokenizer`, or `processor` if it takes pictures.

    `calibration` is what to learn on, in place of `calib_dataset`: texts, conversations (lists of
    messages), rows of a `datasets.Dataset`, of which `nsamples` windows of `seqlen` tokens are
    drawn; or token ids (samples, tokens), a `Feed`, or a `DataLoader` of batches with `input_ids`,
    which are taken as they are, of a loader the first `nsamples`; or a set's name or a file.

    `progress` is shown in a terminal, and in a notebook that has ipywidgets, unless it is False.
    Raises LRQuantError for anything the caller can mend.
    """
    name, loaded, asked = _asked(model, scheme, tokenizer, processor, settings)
    own, asked = asked_data(calibration, asked)
    outcome = run({**asked, "model": name}, loaded, own, shown_progress(progress))
    return Run(outcome.folder, outcome.config, outcome.workbench, outcome.results)


def check(
    model: str | Path | PreTrainedModel,
    scheme: str | Scheme | None = None,
    *,
    calibration: object = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    processor: Processor | None = None,
    **settings: Any,
) -> Checked:
    """Say before a run whether it will work, and what it will take; arguments as of `quantize`.

    Writes nothing.  Raises LRQuantError only for settings that contradict each other.
    """
    name, loaded, asked = _asked(model, scheme, tokenizer, processor, settings)
    own, asked = asked_data(calibration, asked)
    return Checked(preflight({**asked, "model": name}, loaded, own))


def evaluate(
    target: str | Path | Run,
    *,
    model: str | Path | PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    processor: Processor | None = None,
    progress: Progress | bool | None = None,
    **settings: Any,
) -> JsonObject:
    """Measure a run, a checkpoint or a model; `settings` are those of `quantize` that say what is
    measured, and how.

    Where they name no text and no task, a run is measured on its own ones, others on wikitext2.
    A run's results are added to its results.json, or go to `output_dir` if that is given.  `model`
    is a run's full-precision model, if that has moved or was in memory.
    """
    if isinstance(target, Run) and model is None:
        return target.evaluate(progress=progress, **settings)
    place = _target(target)
    if is_run(place):
        loaded, asked = _moved(model, tokenizer, processor, settings)
        return measure_finished(place, loaded, progress, **asked).results
    if model is not None:
        raise LRQuantError(f"target {target}: no run folder, so it has no other `model`; leave it")
    return measure_target(str(target), settings, shown_progress(progress))


def export(
    run: str | Path | Run,
    folder: str | Path,
    *,
    model: str | Path | PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    processor: Processor | None = None,
    progress: Progress | bool | None = None,
    **settings: Any,
) -> Path:
    """Write a finished run as a checkpoint, and return its folder.

    `settings` are `format`, `target`, `save_dtype`, `overwrite` and `device`; `model` is the run's
    full-precision model, if that has moved or was in memory.
    """
    if isinstance(run, Run) and model is None:
        return run.save(folder, progress=progress, **settings)
    loaded, asked = _moved(model, tokenizer, processor, settings)
    return written(_target(run), folder, loaded, progress, **asked)


def load(
    target: str | Path | Run,
    *,
    model: str | Path | PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    processor: Processor | None = None,
    device: str = "auto",
) -> PreTrainedModel:
    """A run, a checkpoint or a model as a transformers model in memory, as it was learned.

    A checkpoint is verified, and refused where transformers would leave a part of it out.  What
    does not fit the device lies on the other GPUs, the host and the disk too.  `model` is a run's
    full-precision model, if that has moved or was in memory.
    """
    if isinstance(target, Run):
        return target.load_model()
    if is_run(_target(target)):
        return Run.open(target, model, tokenizer, processor).load_model()
    return load_checkpoint(str(target), Computing(device, "auto", "auto")).module


def inspect(target: str | Path | Run) -> Shown:
    """What a run folder or checkpoint is, in lines of text; a checkpoint is verified."""
    return Shown(inspect_folder(_target(target)))


def report(run: str | Path | Run) -> Path:
    """Write a run's report.html, .md and .json anew, and return the page."""
    place = _target(run)
    folder = RunFolder.open(place)
    with held(place):
        return write_report(folder)


def compare(runs: Sequence[str | Path | Run], output: str | Path = "compare.html") -> Path:
    """Write one page with runs side by side, and return it; it replaces only such a page."""
    if isinstance(runs, str | Path | Run):
        raise LRQuantError(f"runs {runs}: give a list of run folders")
    return write_comparison(list(map(_target, runs)), Path(output))


class Checked:
    """What a check says: whether it `passed`, each finding, and what the run would take."""

    def __init__(self, preflight: Preflight) -> None:
        self.preflight = preflight

    @property
    def passed(self) -> bool:
        """Whether a run would get through all that is checked."""
        return not self.preflight.failed

    @property
    def failed(self) -> list[str]:
        """What would stop a run, a sentence each."""
        return [f"{finding.what}: {finding.text}" for finding in self.preflight.failed]

    def __repr__(self) -> str:
        return preflight_text(self.preflight)

    def _repr_html_(self) -> str:
        return Shown(self)._repr_html_()


def _asked(
    model: object,
    scheme: str | Scheme | None,
    tokenizer: PreTrainedTokenizerBase | None,
    processor: Processor | None,
    settings: SettingDict,
) -> tuple[str, Model | None, SettingDict]:
    """A model's name, the model if it is in memory, and the settings of a run."""
    name, loaded = named_model(model, tokenizer, processor)
    return name, loaded, asked_settings({"scheme": scheme, **settings})


def _moved(
    model: str | Path | PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    processor: Processor | None,
    settings: SettingDict,
) -> tuple[Model | None, SettingDict]:
    """A run's own model in memory, or the settings with where it lies."""
    if model is None:
        return None, settings
    name, loaded = named_model(model, tokenizer, processor)
    return loaded, settings if loaded is not None else {**settings, "model": name}


def _target(target: object) -> Path:
    """The folder or name that is meant."""
    if not isinstance(target, str | Path | Run) or not str(target).strip():
        raise LRQuantError(f"target {target!r}: give a run folder, a checkpoint or a model")
    return Path(target)
