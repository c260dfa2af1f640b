"""The commands: settings to runs, records to text."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lrquant.cli.flags import settings_of
from lrquant.cli.usual import IN_PLACE, with_usual_places, with_usual_recipe
from lrquant.config.choices import SettingDict, SettingValues
from lrquant.config.config import (
    Config,
    measured_settings,
    overridden,
    settings_afterwards,
    typed_settings,
)
from lrquant.config.settings import read_yaml
from lrquant.errors import LRQuantError
from lrquant.team.launch import Launch

if TYPE_CHECKING:
    from lrquant.cli.screen import Screen
    from lrquant.runs.progress import Progress
    from lrquant.runs.results import Results

RUN_SETTINGS = tuple(entry.name for entry in dataclasses.fields(Config))
STATISTICS_SETTINGS = (
    *("model", "net", "calib_dataset", "nsamples", "seqlen", "seed", "data_dir", "cache_dir"),
    *("device", "precision", "offload"),
    *("calib_images", "calib_image_share", "image_token_weight", "text_column", "bos"),
    "overwrite",
)
EVALUATE_SETTINGS = (
    *(entry.name for kind in measured_settings() for entry in dataclasses.fields(kind)),
    *("compare", "tta", "tta_blocks", "tta_epochs", *settings_afterwards(), "limit", "seqlen"),
    *("data_dir", "cache_dir", "device", "precision", "offload", "output_dir", "report", "log_dir"),
    *("text_column", "bos", "deterministic"),
)
EXPORT_SETTINGS = ("format", "target", "save_dtype", "push_to_hub", "model", "device", "overwrite")


def _config(settings: SettingValues) -> Config:
    return Config(**typed_settings(settings, "command line"))


def _quantize(options: argparse.Namespace, screen: Screen) -> int:
    from lrquant.cli.closing import closing_lines
    from lrquant.pipeline import run

    started = time.monotonic()
    settings = _settings_of_a_run(options)
    if options.published_statistics:
        settings = _with_published_statistics(settings)
    try:
        finished = run(settings, progress=_progress(options, screen))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("finished blocks are kept, go on with --resume") from None
    if Launch.of_environment().rank:
        return 0
    _print_results(finished.results, screen)
    saved = settings.get("save_dir")
    checkpoint = None if saved is None else str(saved)
    screen.say(closing_lines(finished, checkpoint, time.monotonic() - started))
    return _exit_code(finished.results)


def _progress(options: argparse.Namespace, screen: Screen) -> Progress:
    from lrquant.runs.bars import BarProgress
    from lrquant.runs.progress import Progress

    return Progress() if options.quiet else BarProgress(screen)


def _settings_of_a_run(options: argparse.Namespace) -> SettingValues:
    """What was typed over what the file of settings says, and what is usual where nothing is said.

    The published command line has no usual recipe and places but its own.
    """
    origin = str(options.config)
    from_file = typed_settings(read_yaml(options.config), origin) if options.config else {}
    settings = overridden(from_file, settings_of(options, RUN_SETTINGS))
    if not getattr(options, "published_statistics", False):
        settings = with_usual_places(with_usual_recipe(settings), options.save)
    if settings.get("resume") == IN_PLACE:
        settings["resume"] = settings.get("output_dir", Config.output_dir)
    elif settings.get("resume") not in (None, "auto") and "output_dir" not in settings:
        settings["output_dir"] = settings["resume"]
    return settings


def _check(options: argparse.Namespace, screen: Screen) -> None:
    from lrquant.preflight.checks import preflight
    from lrquant.reports.preflight import preflight_text, preflight_values

    logging.getLogger("lrquant").setLevel(logging.ERROR)  # what is left out is a finding
    report = preflight(_settings_of_a_run(options))
    if options.json:
        screen.say(json.dumps(preflight_values(report), indent=1))
    else:
        screen.say(preflight_text(report))
    if report.failed:
        what = ", ".join(dict.fromkeys(finding.what for finding in report.failed))
        raise LRQuantError(f"check: {len(report.failed)} of {len(report.findings)} failed: {what}")


def _families(options: argparse.Namespace, screen: Screen) -> None:
    from lrquant.reports.families import families_text

    screen.say(families_text())


def _with_published_statistics(settings: SettingValues) -> SettingValues:
    """Use ./act_scales/NET.pt and ./act_shifts/NET.pt where the published tool leaves them."""
    net = _config(settings).net_name
    files = {name: Path(name) / f"{net}.pt" for name in ("act_scales", "act_shifts")}
    present = {name: str(path) for name, path in files.items() if path.is_file()}
    return {**present, **settings}


def _stats(options: argparse.Namespace, screen: Screen) -> None:
    from lrquant.ingredients.base.statistics import require_replaceable
    from lrquant.pipeline import collect_statistics

    config = _config(settings_of(options, STATISTICS_SETTINGS))
    scales = options.scales_output_path / f"{config.net_name}.pt"
    shifts = options.shifts_output_path / f"{config.net_name}.pt"
    require_replaceable((scales, shifts), config.overwrite)
    statistics = collect_statistics(config, progress=_progress(options, screen))
    statistics.save(scales, shifts)
    screen.say(f"{len(statistics.maxima)} linears: {scales}, {shifts}")


def _evaluate(options: argparse.Namespace, screen: Screen) -> int:
    from lrquant.api.functions import evaluate

    settings: SettingDict = {**settings_of(options, EVALUATE_SETTINGS)}
    results = evaluate(options.target, progress=_progress(options, screen), **settings)
    if Launch.of_environment().rank:
        return 0
    _print_results(results, screen)
    return _exit_code(results)


def _export(options: argparse.Namespace, screen: Screen) -> None:
    from lrquant.api.functions import export

    settings: SettingDict = {**settings_of(options, EXPORT_SETTINGS)}
    export(options.run, options.folder, progress=_progress(options, screen), **settings)
    screen.say(f"checkpoint: {options.folder}")


def _report(options: argparse.Namespace, screen: Screen) -> None:
    from lrquant.api.functions import report

    screen.say(f"report: {report(options.run)}")


def _compare(options: argparse.Namespace, screen: Screen) -> None:
    from lrquant.api.functions import compare

    screen.say(f"comparison: {compare(options.runs, options.output)}")


def _inspect(options: argparse.Namespace, screen: Screen) -> None:
    from lrquant.api.functions import inspect

    screen.say(inspect(options.target))


def _print_results(results: Results, screen: Screen) -> None:
    from lrquant.measures.tables import results_table

    table = results_table(results)
    if table:
        screen.say(table)


def _exit_code(results: Results) -> int:
    verdict = results.get("max_drop")
    return 1 if isinstance(verdict, dict) and not verdict["acceptable"] else 0
