"""What is measured: a run, a checkpoint or a floating-point model, all in the same way."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lrquant.blocks.head import Head
from lrquant.blocks.materialize import materialize
from lrquant.blocks.plan import FULL_PRECISION, Plan
from lrquant.blocks.streams import Stream
from lrquant.blocks.variants import as_learned, full_precision
from lrquant.blocks.workbench import make_workbench
from lrquant.config.config import Config, optional_path
from lrquant.data.prompts import Reader
from lrquant.data.samples import Samples
from lrquant.errors import LRQuantError
from lrquant.measures.checkpoint import is_checkpoint, load_checkpoint
from lrquant.measures.classification import accuracy, predictions, read_pictures
from lrquant.measures.comparison import TaskBoard
from lrquant.measures.perplexity import score, send_through
from lrquant.measures.reference import reference_name, require_same_tokens
from lrquant.measures.run import entry_of, log_scores, measured_on, read_texts
from lrquant.measures.vqa import answer_all, read_questions
from lrquant.model.device import dtype_name
from lrquant.model.loading import load_model
from lrquant.model.sources import resolve_model
from lrquant.runs.folder import RunFolder
from lrquant.runs.progress import Progress

logger = logging.getLogger("lrquant")


@dataclass(frozen=True)
class Subject:
    """A model as it is measured.

    `variant` is its name in the results, `reader` what makes its inputs, `settings` what it was
    learned with, if anything; `final_states` are the hidden states after the last block, `head`
    makes logits of them, and `module` gives a whole transformers model for the harness.
    """

    variant: str
    reader: Reader
    device: torch.device
    dtype: torch.dtype
    settings: Config | None
    final_states: Callable[[Samples, Progress], Stream]
    head: Callable[[Tensor], Tensor]
    module: Callable[[], PreTrainedModel]


def open_subject(name: str, config: Config) -> Subject:
    """The run folder, checkpoint or model that `name` is; `config` says where it computes."""
    if (Path(name) / "run.json").is_file():
        return _run(name, config)
    if is_checkpoint(name, optional_path(config.cache_dir)):
        return _checkpoint(name, config)
    return _blocks("full_precision", name, config, None)


def check_comparison(config: Config) -> None:
    """Refuse, before any hour is spent, what could not be compared.

    That is a name that is neither a finished run nor a model, and a limit of the loss where there
    would be no loss to hold against it.
    """
    if config.max_drop is not None and not (config.tasks and config.compare):
        needed = "--compare" if config.tasks else "--tasks"
        raise LRQuantError(
            f"--max_drop {config.max_drop:g}: says how much accuracy may be lost; give {needed} too"
        )
    if not isinstance(config.compare, str):
        return
    if (Path(config.compare) / "run.json").is_file():
        RunFolder.open(Path(config.compare)).require_finished()
    else:
        resolve_model(config.compare, optional_path(config.cache_dir))


def open_reference(target: str, config: Config) -> Subject | None:
    """The full-precision model that `agreement` asks `target` to be held against, if it asks."""
    name = reference_name(target, config)
    variant = "base" if name == config.compare else "full_precision"
    return None if name is None else _blocks(variant, name, config, None)


def measure_subject(
    subject: Subject,
    variant: str,
    config: Config,
    board: TaskBoard | None,
    progress: Progress,
    reference: Subject | None = None,
) -> Iterator[dict[str, Any]]:
    """Its perplexities one by one, then its tasks, under the name `variant`.

    With a `reference`, its perplexity and the agreement with it on the texts of `agreement` too.
    One of its blocks is in memory at a time, beside the final hidden states of one text.
    """
    questions = read_questions(config, subject.reader)
    pictures = read_pictures(config, subject.reader)
    others = {} if reference is None else read_texts(config, reference.reader)
    for name, windows in read_texts(config, subject.reader).items():
        logger.info("perplexity on %s", windows.description)
        perplexities: dict[str, Any] = measured_on(windows)
        measured: dict[str, Any] = {"perplexity": {name: perplexities}}
        expected, head = None, None
        if reference is not None and name in config.agreement:
            require_same_tokens(windows, others[name])
            expected, head = reference.final_states(windows, progress), reference.head
            scores = score(head, expected, windows.feed)
            perplexities[reference.variant] = scores["perplexity"]
            log_scores(name, reference.variant, scores)
        states = subject.final_states(windows, progress)
        scores = score(subject.head, states, windows.feed, expected, head)
        log_scores(name, variant, scores)
        perplexities[variant] = scores.pop("perplexity")
        if scores:
            assert reference is not None
            about = measured_on(windows) | {"reference": reference.variant}
            measured["agreement"] = {name: {**about, variant: scores}}
        if reference is not None and reference.dtype != subject.dtype:
            for kind in measured:
                measured[kind][name]["reference_precision"] = dtype_name(reference.dtype)
        yield measured
    if board is None and pictures is None and not questions:
        return
    module = subject.module()
    if pictures is not None:
        found = predictions(pictures, module, variant, progress)
        right = accuracy(pictures, found, None)
        yield {"classification": {**pictures.about, variant: right}}
    yield from answer_all(questions, module, subject.reader, variant, progress)
    if board is not None:
        yield board.add(variant, module, subject.reader)


def _run(name: str, config: Config) -> Subject:
    folder = RunFolder.open(Path(name))
    folder.require_finished()
    return _blocks("quantized", folder.config.model, config, folder)


def _blocks(variant: str, name: str, config: Config, folder: RunFolder | None) -> Subject:
    """A model of which one block is in memory at a time, as learned where there is a run."""
    model = load_model(name, optional_path(config.cache_dir))
    settings = None if folder is None else folder.config
    plan = FULL_PRECISION if settings is None else Plan.of(settings)
    workbench = make_workbench(model, config, plan)
    if folder is not None:
        folder.require_same({"model": model.fingerprint()})
    prepare = full_precision(workbench) if folder is None else as_learned(workbench, folder)

    def final_states(windows: Samples, progress: Progress) -> Stream:
        entry = entry_of(workbench, windows)
        (stream,) = workbench.streams(entry, 1)
        with progress.measuring(f"{windows.name} {variant}", len(model.blocks)) as told:
            send_through(model, prepare, stream, entry, told)
        return stream

    @cache
    def head() -> Head:
        return Head(model, workbench.device, workbench.dtype)

    return Subject(
        variant,
        model,
        workbench.device,
        workbench.dtype,
        settings,
        final_states,
        lambda states: head()(states),
        lambda: materialize(workbench, prepare),
    )


def _checkpoint(name: str, config: Config) -> Subject:
    checkpoint = load_checkpoint(name, config)

    def final_states(windows: Samples, progress: Progress) -> Stream:
        with progress.measuring(f"{windows.name} checkpoint", len(windows.feed), "windows") as told:
            return checkpoint.final_states(windows, told)

    return Subject(
        "quantized",
        checkpoint,
        checkpoint.device,
        checkpoint.dtype,
        checkpoint.settings,
        final_states,
        checkpoint.head,
        lambda: checkpoint.module,
    )
