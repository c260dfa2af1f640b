"""The full-precision model that a checkpoint or another model should agree with."""

from __future__ import annotations

from pathlib import Path

import torch

from lrquant.config.config import Config, optional_path
from lrquant.data.samples import Samples
from lrquant.errors import LRQuantError
from lrquant.measures.choice import text_measures
from lrquant.measures.subjects.checkpoint import is_checkpoint, settings_of
from lrquant.model.sources import resolve_model
from lrquant.runs.folder import is_run


def reference_name(target: str, config: Config) -> str | None:
    """What a measure holds a checkpoint or model against; None if none asks for it.

    That is `--compare` where it names a floating-point model, else the model that the checkpoint
    was made from.
    """
    where = _asked_as(config)
    if where is None:
        return None
    cache = optional_path(config.cache_dir)
    if isinstance(config.compare, str) and not _is_quantized(config.compare, cache):
        return config.compare
    if not is_checkpoint(target, cache):
        if isinstance(config.compare, str):
            raise LRQuantError(
                f"{where}: {config.compare} is quantised, {target} is not; evaluate "
                f"{config.compare} --compare {target}"
            )
        raise LRQuantError(
            f"{where}: {target} is a model, not a run or checkpoint; give the full-precision model "
            "that it should agree with as --compare MODEL"
        )
    settings = settings_of(resolve_model(target, cache).folder)
    if settings is None:
        raise LRQuantError(
            f"{where}: {target} does not say what it was made from (no lrquant.yaml); give the "
            "full-precision model as --compare MODEL"
        )
    try:
        resolve_model(settings.model, cache)
    except LRQuantError as error:
        raise LRQuantError(
            f"{where}: {target} was made from {settings.model}, which is not to be had ({error}); "
            "give the full-precision model as --compare MODEL"
        ) from error
    return settings.model


def _asked_as(config: Config) -> str | None:
    """The flag that asks for full precision to be held against, with its texts."""
    measuring = config.measuring
    for measure in text_measures():
        texts = measure.texts(measuring[measure.settings])
        if measure.against_full_precision and texts:
            return f"--{measure.asked_by[0]} {','.join(texts)}"
    return None


def require_same_tokens(windows: Samples, others: Samples, asked_by: str) -> None:
    """Refuse a reference that reads a text as other tokens: it predicts something else."""
    pairs = zip(windows.feed.inputs, others.feed.inputs, strict=False)
    same = len(windows.feed) == len(others.feed)
    if not (same and all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in pairs)):
        raise LRQuantError(
            f"--{asked_by} {windows.name}: the two models read this text as different tokens; give "
            "the full-precision model that the other was made from as --compare MODEL"
        )


def _is_quantized(name: str, cache: Path | None) -> bool:
    return is_run(Path(name)) or is_checkpoint(name, cache)
