"""What is measured: a run, a checkpoint or a floating-point model, all in the same way."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrquant.config import Config
from lrquant.data import Samples
from lrquant.errors import LRQuantError
from lrquant.evaluation.checkpoint import is_checkpoint, load_checkpoint
from lrquant.evaluation.comparison import TaskBoard
from lrquant.evaluation.measures import measure, preparer, read_texts
from lrquant.evaluation.perplexity import score
from lrquant.materialize import materialize
from lrquant.model import load_model
from lrquant.progress import Progress
from lrquant.scheme import FLOATING_POINT
from lrquant.sources import resolve_model
from lrquant.workbench import make_workbench
from lrquant.workdir import RunFolder

logger = logging.getLogger("lrquant")


@dataclass(frozen=True)
class Subject:
    """A model as it is measured.

    `variant` is its name in the results, `settings` what it was learned with, if anything;
    `perplexity` scores windows, and `module` gives a whole transformers model for the harness.
    """

    variant: str
    tokenizer: PreTrainedTokenizerBase | None
    device: torch.device
    dtype: torch.dtype
    settings: Config | None
    perplexity: Callable[[Samples, Progress], float]
    module: Callable[[], PreTrainedModel]


def open_subject(name: str, config: Config) -> Subject:
    """The run folder, checkpoint or model that `name` is; `config` says where it computes."""
    if (Path(name) / "run.json").is_file():
        return _run(name, config)
    if is_checkpoint(name, _path(config.cache_dir)):
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
        resolve_model(config.compare, _path(config.cache_dir))


def measure_subject(
    subject: Subject, variant: str, config: Config, board: TaskBoard | None, progress: Progress
) -> Iterator[dict[str, Any]]:
    """Its perplexities one by one, then its tasks, under the name `variant`."""
    for name, windows in read_texts(config, subject.tokenizer).items():
        value = subject.perplexity(windows, progress)
        yield {"perplexity": {name: {"text": windows.description, variant: value}}}
    if board is not None:
        yield board.add(variant, subject.module(), subject.tokenizer)


def _run(name: str, config: Config) -> Subject:
    folder = RunFolder.open(Path(name))
    folder.require_finished()
    return _blocks("quantized", folder.config.model, config, folder)


def _blocks(variant: str, name: str, config: Config, folder: RunFolder | None) -> Subject:
    """A model of which one block is in memory at a time, as learned where there is a run."""
    model = load_model(name, _path(config.cache_dir))
    workbench = make_workbench(model, config)
    settings = None if folder is None else folder.config
    if folder is not None:
        folder.require_same({"model": model.fingerprint()})
    scheme = FLOATING_POINT if settings is None else settings.quantization
    prepare = preparer(workbench, scheme, settings, folder)

    def perplexity(windows: Samples, progress: Progress) -> float:
        found = measure(workbench, windows, {variant: prepare}, progress)
        return found["perplexity"][windows.name][variant]

    return Subject(
        variant,
        model.tokenizer,
        workbench.device,
        workbench.dtype,
        settings,
        perplexity,
        lambda: materialize(workbench, prepare, prepare.tower),
    )


def _checkpoint(name: str, config: Config) -> Subject:
    checkpoint = load_checkpoint(name, config)

    def perplexity(windows: Samples, progress: Progress) -> float:
        logger.info("perplexity on %s", windows.description)
        states = checkpoint.final_states(windows)
        found = score(checkpoint.head, states, windows.ids)["perplexity"]
        logger.info("%s perplexity, checkpoint: %.4f", windows.name, found)
        return found

    return Subject(
        "quantized",
        checkpoint.tokenizer,
        checkpoint.device,
        checkpoint.dtype,
        checkpoint.settings,
        perplexity,
        lambda: checkpoint.module,
    )


def _path(value: str | None) -> Path | None:
    return None if value is None else Path(value)
