"""The pre-flight: whether a run will work and what it will need, said before it starts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import torch

from lrquant.blocks.inputs import BlockInputs
from lrquant.blocks.plan import Plan
from lrquant.blocks.workbench import Workbench
from lrquant.config.config import Config
from lrquant.config.groups import Adapting, Learning, Places, StatisticsFiles
from lrquant.data.own import OwnData
from lrquant.data.samples import Samples
from lrquant.errors import LRQuantError
from lrquant.files.whole import JsonObject
from lrquant.ingredients.tuning import Tuning
from lrquant.learn.identity import describe_run
from lrquant.learn.share import require_steps
from lrquant.measures.choice import texts_against_full_precision
from lrquant.measures.evaluation.resolution import resolve_settings
from lrquant.model.device import free_memory
from lrquant.model.model import Model
from lrquant.preflight.contents import contents
from lrquant.preflight.estimate import (
    Seconds,
    checkpoint_size,
    estimate_memory,
    handed_bytes,
    learning_seconds,
    measuring_seconds,
    run_bytes,
    stream_bytes,
)
from lrquant.preflight.findings import Preflight
from lrquant.preflight.handed import handed_row_bytes
from lrquant.preflight.kinds import probe_kinds
from lrquant.preflight.load import Load, TextLoad, language_load, tower_load
from lrquant.preflight.places import check_disk, check_places, check_run_folder
from lrquant.preflight.probe import fewer_experts
from lrquant.preflight.prospect import Prospect
from lrquant.preflight.requirements import requirements
from lrquant.preflight.tuning import transfer_seconds, tuning_bytes, tuning_seconds
from lrquant.runs.folder import RunFolder
from lrquant.team.launch import Launch

_FEWER = "fewer or shorter samples"
_MEND = f"--offload disk, {_FEWER}, or a smaller --batch_size"
_TUNING = "it is the end-to-end stage that needs it: "
_TUNING_MEND = "leave out --tune-rounding, or --tune"


def preflight(
    settings: JsonObject, model: Model | None = None, calibration: OwnData | None = None
) -> Preflight:
    """Check the run that `settings`, fields of `Config`, ask for, without starting it.

    Reads the weights of one block of each kind, times a few steps of it and writes nothing.  Raises
    LRQuantError only for settings that contradict each other; all else is a finding.
    """
    config, measure_only = resolve_settings(settings)
    launch = Launch.of_environment()
    report = Preflight(config, launch.size, local_processes=launch.local_size)
    plan = Plan.of(config.quantizing)
    run = Prospect(config, measure_only, plan, model, calibration, apart=True)
    for check in requirements(run):
        with report.checking(check.what, check.more):
            for said in check.of():
                report.add(said.what or check.what, said.state, said.text)
    if report.processes > 1 and not measure_only:
        _check_processes(report, config.group(Learning))
    places = config.group(Places)
    if run.model is None:
        check_places(report, places, config.save_dir)
        report.add("all else", "not checked", "needs the model")
        return report
    if "groups" in run.passed:
        report.contents = contents(run.model, run.plan.schemes)
    report.carried = sorted(run.model.source.extra_names())
    fits = _check_packing(report, run, run.model) and _check_length(report, run.model)
    finished = len(run.model.blocks) if measure_only else 0
    if not measure_only:
        finished = check_run_folder(report, places, len(run.model.blocks), _identity(run))
    check_places(report, places, config.save_dir)
    if run.model.architecture.reads_pixels and run.calibration is None:
        report.add("memory, disk, time", "not checked", "need pictures to calibrate on")
    elif fits and run.workbench is not None:
        _estimate(report, run, run.workbench, finished)
    else:
        report.add("memory, disk, time", "not checked", "need sizes that fit and a device")
    return report


def _identity(run: Prospect) -> Callable[[], JsonObject] | None:
    """What the run is, as far as it has been opened and read."""
    bench, calibration = run.workbench, run.calibration
    if bench is None or calibration is None:
        return None
    learning, files = run.config.group(Learning), run.config.group(StatisticsFiles)
    return partial(describe_run, bench, learning, calibration, files, run.tuning)


def _check_processes(report: Preflight, learning: Learning) -> None:
    """Whether each process has a sample of every step."""
    with report.checking("processes"):
        require_steps(learning.batch_size, learning.micro_batch_size, report.processes)
        most = math.ceil(learning.batch_size / report.processes)
        text = (
            f"{report.processes}, each with at most {most} of {learning.batch_size} samples a step"
        )
        report.add("processes", "ok", text)


def _check_length(report: Preflight, model: Model) -> bool:
    """Whether the model has as many positions as a sample has tokens."""
    if model.architecture.reads_pixels:
        return True
    with report.checking("seqlen"):
        ids = torch.zeros((1, report.config.seqlen), dtype=torch.int64)
        BlockInputs(model, ids, 1, torch.device("cpu"))
        return True
    return False


def _check_packing(report: Preflight, run: Prospect, model: Model) -> bool:
    """What a checkpoint will take; whether all shapes fit."""
    if not run.passed >= {"groups", "format"} or run.form is None:
        return "groups" in run.passed
    with report.checking("packing"):
        settings = len(run.config.to_yaml().encode())
        size = report.checkpoint = checkpoint_size(model, run.plan, run.form, settings)
        bits = f"{size.bits_per_weight:.3f} bits a weight"
        report.add("packing", "ok", f"{run.form.name}: {bits}")
        return True
    return False


def _estimate(report: Preflight, run: Prospect, workbench: Workbench, finished: int) -> None:
    """Measure the blocks of each part, and hold memory, disk and time against what there is."""
    config, model, calibration = report.config, workbench.model, run.calibration
    learning, with_files = config.group(Learning), config.act_scales is not None
    with report.checking("memory"):
        lengths = [config.seqlen] * config.nsamples
        of_blocks = dataclasses.replace(workbench, plan=workbench.plan.of_blocks)
        load = _shared(report, language_load(of_blocks, learning, calibration, lengths))
        tower = tower_load(of_blocks, learning, calibration)
        tower = None if tower is None else _shared(report, tower)
        report.stream_bytes = max(stream_bytes(part) for part in (load, tower) if part is not None)
    if report.stream_bytes is None:
        return
    storage = workbench.storage(report.stream_bytes)
    with report.checking("disk"):
        on_disk = report.stream_bytes if storage == "disk" else 0
        report.run_bytes = run_bytes(model, workbench.plan, config.report)
        check_disk(report, config.output_dir, config.save_dir, on_disk)
    with report.checking("memory"):
        _require_room(workbench)
        cuda = workbench.device.type == "cuda"
        inside = storage == "device" or (storage == "host" and not cuda)
        before = 0 if cuda else psutil.Process().memory_info().rss
        seconds, in_tower = 0.0, 0
        if tower is not None and finished < len(model.blocks):
            costs = probe_kinds(tower)
            in_tower = estimate_memory(tower, costs, before, inside).peak
            seconds = learning_seconds(tower, costs, _finished_in_tower(config), with_files)
        costs = report.costs = probe_kinds(load)
        if finished < len(model.blocks):
            seconds += learning_seconds(load, costs, finished, with_files)
        row = handed_row_bytes(load)
        stage = _tuning_load(report, run, workbench)
        in_tuning = 0
        if stage is not None:
            needed, apart = _tuning_memory(report, *stage, storage, row)
            in_tuning = before + needed
            seconds += tuning_seconds(stage[0], costs, stage[1])
            samples = stage[1].tune_nsamples or config.nsamples
            seconds += transfer_seconds(*stage, samples) if apart else 0
        measured = _text_load(config, list(run.texts.values()), report.processes)
        measuring = measuring_seconds(model, costs, measured, learning.keep_best)
        report.seconds = Seconds(seconds, measuring)
        handed = row if storage == "device" or not cuda else 0
        memory = estimate_memory(load, costs, before, inside, measured, handed)
        report.memory = dataclasses.replace(memory, tower=in_tower, tuning=in_tuning)
        _compare_peak(report, workbench, before)
        if cuda:
            _compare_host(report, storage, handed_bytes(load, row) * (storage != "device"))


def _tuning_load(
    report: Preflight, run: Prospect, workbench: Workbench
) -> tuple[Load, Tuning] | None:
    """What is tuned end to end, if anything is."""
    config = run.config
    for each in workbench.plan.ingredients:
        if isinstance(each, Tuning):
            lengths = [config.seqlen] * (each.tune_nsamples or config.nsamples)
            load = language_load(workbench, config.group(Learning), run.tuning, lengths)
            return _shared(report, load), each
    return None


def _tuning_memory(
    report: Preflight, load: Load, tuning: Tuning, storage: str, row: int
) -> tuple[int, bool]:
    """Bytes of the end-to-end stage on the device, and whether its blocks live apart, on the host.

    What it has there is noted.
    """
    bench, states = load.workbench, stream_bytes(load)
    needed = tuning_bytes(load, tuning, row)
    if bench.device.type != "cuda":
        return states * (storage == "host") + needed.on_device(False), False
    on_device = states * (storage == "device")
    apart = bench.home(needed.kept, on_device) != bench.device
    report.tuned_on_host = needed.kept * apart + states * (storage == "host")
    return on_device + needed.on_device(apart), apart


def _compare_peak(report: Preflight, bench: Workbench, before: int) -> None:
    """Hold the peak against what is free, of which the process has taken so much `before`."""
    assert report.memory is not None
    peak, cuda = report.memory.peak, bench.device.type == "cuda"
    together = 1 if cuda else report.local_processes
    where = f"on {bench.device}" + (f" for {together} processes" if together > 1 else "")
    mend = f"use {fewer_experts(bench)}{_MEND}"
    if peak == report.memory.tuning:
        moved = cuda and bench.offload == "device"
        mend = _TUNING + ("use --offload auto, or " if moved else "") + _TUNING_MEND
    report.compare("memory", together * peak, free_memory(bench.device) + before, where, mend)


def _compare_host(report: Preflight, storage: str, handed: int) -> None:
    """Hold what CUDA devices leave on the host: states, unless on disk, and `handed` bytes.

    Once all blocks are learned, it is those that are tuned, with their own states.
    """
    assert report.stream_bytes is not None
    kept, mend = (report.stream_bytes, _MEND) if storage == "host" else (0, _FEWER)
    each, mend = kept + handed, f"use {mend}"
    if report.tuned_on_host > each:
        each, mend = report.tuned_on_host, _TUNING + _TUNING_MEND
    if needed := report.local_processes * each:
        free = psutil.virtual_memory().available
        report.compare("memory", needed, free, "on the host", mend)


def _shared(report: Preflight, load: Load) -> Load:
    """The same, learned by all processes."""
    return dataclasses.replace(load, processes=report.processes)


def _text_load(config: Config, texts: list[Samples], processes: int) -> TextLoad:
    """What is to be measured of the texts."""
    adapting = config.group(Adapting) if config.tta else None
    against = texts_against_full_precision(config.measuring)
    return TextLoad(texts, config.seqlen, against, bool(config.compare), adapting, processes)


def _finished_in_tower(config: Config) -> int:
    return RunFolder(Path(config.resume)).tower.finished_blocks() if config.resume else 0


def _require_room(workbench: Workbench) -> None:
    """Refuse to measure a block whose weights, learned weights and gradients cannot fit.

    Of experts one by one there are weights and codes.
    """
    blocks = [block.state_dict().values() for block in workbench.model.blocks]
    largest = max(sum(tensor.numel() for tensor in block) for block in blocks)
    least = largest * (1 + workbench.dtype.itemsize)
    if not workbench.by_expert:
        least = largest * 3 * workbench.dtype.itemsize
    free = free_memory(workbench.device)
    if least > free:
        raise LRQuantError(
            f"one block needs more than {least / 1e9:.2f} GB, {free / 1e9:.2f} GB are free on "
            f"{workbench.device}; use {fewer_experts(workbench)}a machine with more memory"
        )
