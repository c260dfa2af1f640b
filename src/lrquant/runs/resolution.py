"""The settings of a command, over those of the finished run that it measures."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from lrquant.config.config import Config, typed_settings, with_preset
from lrquant.config.settings import require_one_scheme
from lrquant.numerics.grids.schemes import weight_grid
from lrquant.numerics.losses import terms_of
from lrquant.runs.folder import RunFolder


def measures_anything(config: Config) -> bool:
    """Whether the settings ask for any measure."""
    return bool(config.perplexity_sets or config.tasks or config.vqa or config.classify)


def resolve_settings(settings: dict[str, Any]) -> tuple[Config, bool]:
    """The run that `settings` ask for, and whether a finished one is only measured."""
    settings = typed_settings(settings, "settings")
    require_one_scheme(settings)
    measure_only = settings.get("epochs") == 0 and settings.get("resume") is not None
    if measure_only:
        settings = _settings_of_finished_run(settings)
    config = Config(**with_preset(settings)).resolved()
    _require_declared(config)
    return config, measure_only


def _require_declared(config: Config) -> None:
    """Refuse losses and grids that neither this package nor another declares."""
    terms_of(config.loss)
    for scheme in config.schemes.every:
        weight_grid(scheme)


def _settings_of_finished_run(given: dict[str, Any]) -> dict[str, Any]:
    """The run's own settings, with what was given of how to measure."""
    own = RunFolder.open(Path(given["resume"])).config
    chosen = {name: given[name] for name in _MEASURE_SETTINGS if given.get(name) is not None}
    places = {"output_dir": given["resume"], "resume": given["resume"], "save_dir": None}
    places |= {"log_dir": None, "overwrite": False}
    places |= {"target": None} if given.get("format") else {}
    replaced = NO_MEASURES if asks_for_measures(given) else {}
    return dataclasses.asdict(own) | replaced | places | chosen


def asks_for_measures(settings: dict[str, Any]) -> bool:
    names = ("eval_ppl", "ppl", "agreement", "tasks", "vqa", "classify")
    return any(settings.get(name) for name in names)


NO_MEASURES: dict[str, Any] = {
    **{"eval_ppl": False, "ppl": (), "agreement": (), "compare": False, "tasks": ""},
    **{"limit": -1, "tta": False, "max_drop": None, "vqa": (), "classify": None},
}


_MEASURE_SETTINGS = (
    *("eval_ppl", "ppl", "agreement", "compare", "max_drop", "tasks", "num_fewshot"),
    *("limit", "task_batch_size", "vqa", "classify"),
    *("tta", "tta_blocks", "tta_epochs", "tta_let_lr", "output_dir", "save_dir", "format"),
    *("report", "log_dir", "overwrite"),
    *("target", "save_dtype", "text_column", "bos"),
    *("device", "precision", "offload", "data_dir", "cache_dir", "seqlen", "model"),
)
