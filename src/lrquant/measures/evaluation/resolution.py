"""The settings of a command, over those of the finished run that it measures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from lrquant.config.choices import SettingDict
from lrquant.config.config import (
    Config,
    measured_settings,
    settings_afterwards,
    typed_settings,
    with_preset,
)
from lrquant.config.settings import read_yaml, require_one_scheme
from lrquant.files.manifest import SETTINGS
from lrquant.measures.choice import measures, measures_anything
from lrquant.numerics.grids.schemes import weight_grid
from lrquant.numerics.losses import terms_of
from lrquant.runs.folder import RunFolder

RESUME_WHERE_THERE_IS_ONE = "auto"
_HOW = ("compare", "limit", "tta", "tta_blocks", "tta_epochs", "seqlen")
_WHERE = (
    *("output_dir", "save_dir", "format", "target", "save_dtype", "push_to_hub", "report"),
    "log_dir",
)
_WITH = ("overwrite", "text_column", "bos", "device", "precision", "offload", "data_dir")
_READ = ("text_column", "bos", "data_dir", "cache_dir", "device", "precision")
_SETTINGS = (*_HOW, *_WHERE, *_WITH, "cache_dir", "model")


def resolve_settings(settings: SettingDict) -> tuple[Config, bool]:
    """The run that `settings` ask for, and whether a finished one is only measured."""
    settings = _gone_on_with(typed_settings(settings, "settings"))
    require_one_scheme(settings)
    measure_only = settings.get("epochs") == 0 and settings.get("resume") is not None
    if measure_only:
        settings = _settings_of_finished_run(settings)
    config = Config(**with_preset(settings)).resolved()
    _require_declared(config)
    return config, measure_only


def _gone_on_with(settings: SettingDict) -> SettingDict:
    """`resume` "auto": the run in `output_dir` where there is one, else none.

    A checkpoint in `save_dir` that is of that run is left as it is.
    """
    if settings.get("resume") != RESUME_WHERE_THERE_IS_ONE:
        return settings
    output = settings.get("output_dir", Config.output_dir)
    settings = {**settings, "resume": output if RunFolder(Path(output)).has_run() else None}
    target = settings.get("save_dir")
    there = target and is_checkpoint_of(Path(target), Path(output))
    if settings["resume"] is not None and there and not settings.get("push_to_hub"):
        settings["save_dir"] = None
    return settings


def is_checkpoint_of(target: Path, output_dir: Path) -> bool:
    """Whether the checkpoint in `target` says that it is of the run in `output_dir`."""
    path = target / SETTINGS
    if not path.is_file():
        return False
    named = read_yaml(path).get("output_dir")
    return named is not None and Path(str(named)).resolve() == output_dir.resolve()


def _require_declared(config: Config) -> None:
    """Refuse losses and grids that neither this package nor another declares."""
    terms_of(config.loss)
    for scheme in config.schemes.every:
        weight_grid(scheme)


def _settings_of_finished_run(asked: SettingDict) -> SettingDict:
    """The run's own settings, with what was given of how to measure."""
    own = RunFolder.open(Path(str(asked["resume"]))).config
    names = (*measure_settings(), *settings_afterwards(), *_SETTINGS)
    chosen = {name: asked[name] for name in names if asked.get(name) is not None}
    places = {"output_dir": asked["resume"], "resume": asked["resume"], "save_dir": None}
    places |= {"log_dir": None, "overwrite": False, "push_to_hub": None}
    places |= {"target": None} if asked.get("format") else {}
    replaced = no_measures() if asks_for_measures(asked) else {}
    return dataclasses.asdict(own) | replaced | places | chosen


def asks_for_measures(settings: Mapping[str, object]) -> bool:
    """Whether settings by name ask for any measure."""
    return any(settings.get(name) for measure in measures() for name in measure.asked_by)


def default_measures() -> SettingDict:
    """The settings that ask for what is measured where no measure is asked for."""
    return {name: value for m in measures() for name, value in m.by_default.items()}


def measure_settings() -> list[str]:
    """Names of the settings that measures bring."""
    return [entry.name for kind in measured_settings() for entry in dataclasses.fields(kind)]


def no_measures() -> SettingDict:
    """The settings that ask for no measure at all."""
    asking = {name for m in measures() for name in (*m.asked_by, *m.of_one_command)}
    names = {*asking, "compare", "limit", "tta"}
    return {e.name: e.default for e in dataclasses.fields(Config) if e.name in names}


def asked_later(config: Config, own: Config) -> SettingDict:
    """What a command asked to be measured of a run, where its `own` settings do not ask for it."""
    asked, first = _asked_of(config, own), _asked_of(own, own)
    return {} if asked == first or not measures_anything(config.measuring) else asked


def _asked_of(config: Config, own: Config) -> SettingDict:
    """Settings that ask for measures, and others that are not the run's own, as JSON has them."""
    plain = {entry.name: entry.default for entry in dataclasses.fields(Config)}
    usual = {name: plain[name] for name in (*measure_settings(), "compare", "limit", "tta")}
    rest = (*_HOW[3:], *settings_afterwards(), *_READ)
    usual |= {name: getattr(own, name) for name in rest}
    values = {name: getattr(config, name) for name in usual}
    changed = {name: value for name, value in values.items() if value != usual[name]}
    return {n: list(v) if isinstance(v, tuple) else v for n, v in changed.items()}
