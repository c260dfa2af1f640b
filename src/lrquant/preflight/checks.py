"""The pre-flight: whether a run will work and what it will need, said before it starts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import psutil
import torch

from lrquant.blocks.inputs import BlockInputs
from lrquant.blocks.plan import Plan
from lrquant.blocks.workbench import Workbench, make_workbench
from lrquant.config.config import Config, optional_path
from lrquant.data.calibration import calibration_of
from lrquant.data.prompts import takes_pictures
from lrquant.data.samples import Samples
from lrquant.data.vocabulary import strange_tokenizer
from lrquant.errors import LRQuantError
from lrquant.export.checkpoint import checkpoint_dtype
from lrquant.files.whole import JsonObject
from lrquant.ingredients.base.statistics import given_statistics
from lrquant.learn.adaptation import check_adaptation
from lrquant.learn.checks import check_grids, check_ingredients
from lrquant.learn.model import require_pictures
from lrquant.measures.run import prepare_evaluation
from lrquant.measures.subject import check_comparison
from lrquant.measures.zero_shot import load_tasks
from lrquant.model.device import dtype_name
from lrquant.model.loading import load_model
from lrquant.model.model import Model
from lrquant.model.outer import require_finite
from lrquant.preflight.estimate import (
    Seconds,
    estimate_memory,
    learning_seconds,
    measuring_seconds,
    run_bytes,
    stream_bytes,
)
from lrquant.preflight.findings import Preflight
from lrquant.preflight.load import language_load, tower_load
from lrquant.preflight.places import check_disk, check_places, check_run_folder
from lrquant.preflight.probe import probe_block
from lrquant.preflight.runtime import check_shapes, chosen_format
from lrquant.runs.folder import RunFolder
from lrquant.runs.resolution import resolve_settings

_MEND = "use --offload disk, fewer or shorter samples, or a smaller --batch_size"


def preflight(settings: JsonObject, model: Model | None = None) -> Preflight:
    """Check the run that `settings`, fields of `Config`, ask for, without starting it.

    Reads one block's weights, times a few steps of it and writes nothing.  Raises LRQuantError only
    for settings that contradict each other; all else is a finding.
    """
    config, measure_only = resolve_settings(settings)
    done = Preflight(config)
    plan = Plan.of(config)
    form = chosen_format(done)
    with done.checking("model"):
        model = model or load_model(config.model, optional_path(config.cache_dir))
        text = f"{model.architecture.name}, {len(model.blocks)} blocks"
        done.add("model", "ok", f"{text}, {model.parameters / 1e6:.1f} M parameters")
        _check_kind(done, model)
    if model is None:
        check_places(done)
        done.add("all else", "not checked", "needs the model")
        return done
    with done.checking("weights"):
        require_finite(model, None if form is None else checkpoint_dtype(model, plan, form))
    fits = check_shapes(done, model, form) and _check_length(done, model)
    if fits:
        with done.checking("ingredients"):
            check_ingredients(model, plan)
    workbench = _check_device(done, model)
    calibration = None if measure_only else _check_calibration(done, model)
    _check_tower(done, model, calibration)
    texts = _check_evaluation(done, model)
    finished = len(model.blocks) if measure_only else 0
    if not measure_only:
        finished = check_run_folder(done, model, workbench, calibration)
    check_places(done)
    if model.architecture.reads_pixels and calibration is None:
        done.add("memory, disk, time", "not checked", "need pictures to calibrate on")
    elif fits and workbench is not None:
        _estimate(done, workbench, calibration, texts, finished)
    else:
        done.add("memory, disk, time", "not checked", "need sizes that fit and a device")
    return done


def _check_kind(done: Preflight, model: Model) -> None:
    """What is to be known of the weights and of the tokenizer."""
    packed, strange = model.source.unpacked_from(), strange_tokenizer(model)
    if packed:
        text = f"unpacked from {packed}: full precision is that of these"
        done.add("weights", "warning", text)
    if strange is not None:
        done.add("tokenizer", "warning", strange)


def _check_tower(done: Preflight, model: Model, calibration: Samples | None) -> None:
    """Whether the vision tower can have the scheme that is asked for, and pictures to learn on."""
    scheme = done.config.vision_quantization
    if scheme is None:
        return
    with done.checking("vision tower"):
        tower = model.require_tower()
        check_grids(tower, Plan.of(done.config).tower)
        if calibration is not None:
            require_pictures(done.config, calibration.feed)
        done.add("vision tower", "ok", f"{len(tower.blocks)} blocks at {scheme.name}")


def _check_length(done: Preflight, model: Model) -> bool:
    """Whether the model has as many positions as a sample has tokens."""
    if model.architecture.reads_pixels:
        return True
    with done.checking("seqlen"):
        ids = torch.zeros((1, done.config.seqlen), dtype=torch.int64)
        BlockInputs(model, ids, 1, torch.device("cpu"))
        return True
    return False


def _check_device(done: Preflight, model: Model) -> Workbench | None:
    with done.checking("device"):
        workbench = make_workbench(model, done.config)
        text = f"matrix products in {dtype_name(workbench.dtype)} on {workbench.device}"
        done.add("device", "ok", text)
        return workbench
    return None


def _check_calibration(done: Preflight, model: Model) -> Samples | None:
    """The calibration text, and given statistics."""
    with done.checking("statistics"):
        given_statistics(done.config)
    with done.checking("calibration"):
        calibration = calibration_of(done.config, model, None)
        done.add("calibration", "ok", calibration.description)
        return calibration
    return None


def _check_evaluation(done: Preflight, model: Model) -> list[Samples]:
    """Each text and task by itself, so that all that are missing are named."""
    config = done.config
    alone: JsonObject = {"ppl": (), "agreement": (), "eval_ppl": False, "tasks": ""}
    alone |= {"tta": False, "vqa": (), "classify": None}
    with done.checking("evaluation"):
        check_comparison(config)
    parts: list[JsonObject] = [
        {"ppl": (name,)} for name in dict.fromkeys((*config.ppl, *config.agreement))
    ]
    parts += [{"eval_ppl": True}] if config.eval_ppl and not config.ppl else []
    parts += [{"vqa": (name,)} for name in config.vqa]
    parts += [{"classify": config.classify}] if config.classify else []
    parts += [{"tasks": name.strip()} for name in config.tasks.split(",") if name.strip()]
    found: dict[str, Samples] = {}
    for part in parts:
        with done.checking("evaluation"):
            wanted = dataclasses.replace(config, **{**alone, **part})
            tasks = load_tasks(wanted)
            read = prepare_evaluation(wanted, model)
            for text in read.texts.values():
                done.add("evaluation", "ok", text.description)
            for each in (*read.questions.values(), read.pictures):
                if each is not None:
                    done.add("evaluation", "ok", f"{each.description}; its time is not estimated")
            found |= read.texts
            missing = [name for name in wanted.perplexity_sets if name not in read.texts]
            if missing:
                done.add("evaluation", "warning", f"left out: {', '.join(missing)}")
            if tasks is not None:
                said = f"task {wanted.tasks}"
                said += "".join(f", {tasks.sets[n]}" for n in tasks.names if n in tasks.sets)
                done.add("evaluation", "ok", f"{said}; its time is not estimated")
    if config.tta:
        with done.checking("evaluation"):
            check_adaptation(config, len(model.blocks), takes_pictures(model))
            done.add("evaluation", "ok", f"adapting the last {config.tta_blocks} blocks to each")
    return list(found.values())


def _estimate(
    done: Preflight,
    workbench: Workbench,
    calibration: Samples | None,
    texts: list[Samples],
    finished: int,
) -> None:
    """Measure one block of each part, and hold memory, disk and time against what there is."""
    config, model = done.config, workbench.model
    with done.checking("memory"):
        load = language_load(workbench, config, calibration)
        tower = tower_load(workbench, config, calibration)
        done.stream_bytes = max(stream_bytes(part) for part in (load, tower) if part is not None)
    if done.stream_bytes is None:
        return
    place = workbench.place(done.stream_bytes)
    with done.checking("disk"):
        done.run_bytes = run_bytes(model, workbench.plan, config.report)
        check_disk(done, done.stream_bytes if place == "disk" else 0)
    with done.checking("memory"):
        _require_room(workbench)
        cuda = workbench.device.type == "cuda"
        inside = place == "device" or (place == "host" and not cuda)
        before = 0 if cuda else psutil.Process().memory_info().rss
        learning, in_tower = 0.0, 0
        if tower is not None and finished < len(model.blocks):
            costs = probe_block(tower)
            learning = learning_seconds(tower, costs, _finished_in_tower(config))
            in_tower = estimate_memory(tower, costs, before, inside, []).peak
        costs = done.costs = probe_block(load)
        if finished < len(model.blocks):
            learning += learning_seconds(load, costs, finished)
        done.seconds = Seconds(learning, measuring_seconds(model, config, costs, texts))
        memory = estimate_memory(load, costs, before, inside, texts)
        done.memory = dataclasses.replace(memory, tower=in_tower)
        free, where = _free_memory(workbench.device) + before, f"on {workbench.device}"
        done.compare("memory", done.memory.peak, free, where, _MEND)
        if cuda and place == "host":
            free = psutil.virtual_memory().available
            done.compare("memory", done.stream_bytes, free, "on the host", _MEND)


def _finished_in_tower(config: Config) -> int:
    return RunFolder(Path(config.resume)).tower.finished_blocks() if config.resume else 0


def _require_room(workbench: Workbench) -> None:
    """Refuse to measure a block whose weights, learned weights and gradients cannot fit."""
    shapes = workbench.model.blocks[0].state_dict().values()
    least = sum(tensor.numel() for tensor in shapes) * 3 * workbench.dtype.itemsize
    free = _free_memory(workbench.device)
    if least > free:
        raise LRQuantError(
            f"one block needs more than {least / 1e9:.2f} GB, {free / 1e9:.2f} GB are free on "
            f"{workbench.device}; use a machine with more memory"
        )


def _free_memory(device: torch.device) -> int:
    """Bytes that this process may still take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
