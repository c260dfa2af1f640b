"""The pre-flight: whether a run will work and what it will need, said before it starts."""

from __future__ import annotations

import dataclasses
from typing import Any

import psutil
import torch

from lrquant.calibration import calibration_of, given_statistics
from lrquant.config import optional_path
from lrquant.data import Samples
from lrquant.errors import LRQuantError
from lrquant.evaluation.adaptation import check_adaptation
from lrquant.evaluation.measures import prepare_evaluation
from lrquant.evaluation.subject import check_comparison
from lrquant.evaluation.zero_shot import load_tasks
from lrquant.identity import dtype_name
from lrquant.inputs import BlockInputs
from lrquant.learning import require_pictures
from lrquant.model import Model, load_model
from lrquant.pipeline import check_groups, resolve_settings
from lrquant.preflight.estimate import (
    Seconds,
    estimate_memory,
    learning_seconds,
    measuring_seconds,
    run_bytes,
    stream_bytes,
)
from lrquant.preflight.findings import Preflight
from lrquant.preflight.places import check_disk, check_places, check_run_folder
from lrquant.preflight.probe import probe_block
from lrquant.preflight.runtime import check_shapes, chosen_format
from lrquant.workbench import Workbench, make_workbench

_MEND = "use --offload disk, fewer or shorter samples, or a smaller --batch_size"


def preflight(settings: dict[str, Any], model: Model | None = None) -> Preflight:
    """Check the run that `settings`, fields of `Config`, ask for, without starting it.

    Reads one block's weights, times a few steps of it and writes nothing.  Raises LRQuantError only
    for settings that contradict each other; all else is a finding.
    """
    config, measure_only = resolve_settings(settings)
    done = Preflight(config)
    form = chosen_format(done)
    with done.checking("model"):
        model = model or load_model(config.model, optional_path(config.cache_dir))
        text = f"{model.architecture.name}, {len(model.blocks)} blocks, {_parameters(model):.1f} M"
        done.add("model", "ok", f"{text} parameters")
    if model is None:
        check_places(done, None)
        done.add("all else", "not checked", "needs the model")
        return done
    fits = check_shapes(done, model, form) and _check_length(done, model)
    workbench = _check_device(done, model)
    calibration = None if measure_only else _check_calibration(done, model)
    _check_tower(done, model, calibration)
    texts = _check_evaluation(done, model)
    finished = len(model.blocks) if measure_only else 0
    if not measure_only:
        finished = check_run_folder(done, model, workbench, calibration)
    check_places(done, model)
    if model.architecture.reads_pixels:
        done.add("memory, disk, time", "not checked", "not estimated for classifiers of pictures")
    elif fits and workbench is not None:
        _estimate(done, workbench, texts, finished)
    else:
        done.add("memory, disk, time", "not checked", "need sizes that fit and a device")
    return done


def _check_tower(done: Preflight, model: Model, calibration: Samples | None) -> None:
    """Whether the vision tower can have the scheme that is asked for, and pictures to learn on."""
    scheme = done.config.vision_quantization
    if scheme is None:
        return
    with done.checking("vision tower"):
        tower = model.require_tower()
        check_groups(tower, scheme)
        if calibration is not None:
            require_pictures(done.config, calibration.feed)
        text = f"{len(tower.blocks)} blocks; their time and memory are not estimated"
        done.add("vision tower", "ok", text)


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
    alone: dict[str, Any] = {"ppl": (), "agreement": (), "eval_ppl": False, "tasks": ""}
    alone |= {"tta": False, "vqa": (), "classify": None}
    with done.checking("evaluation"):
        check_comparison(config)
    parts: list[dict[str, Any]] = [
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
            for each in (*read.texts.values(), *read.questions.values(), read.pictures):
                if each is not None:
                    done.add("evaluation", "ok", each.description)
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
            check_adaptation(config, len(model.blocks))
            done.add("evaluation", "ok", f"adapting the last {config.tta_blocks} blocks to each")
    return list(found.values())


def _estimate(done: Preflight, workbench: Workbench, texts: list[Samples], finished: int) -> None:
    """Measure one block, and hold memory, disk and time against what there is."""
    config, model = done.config, workbench.model
    shape = config.nsamples, config.seqlen, model.hidden_size
    count = 3 if config.two_branch else 2
    done.stream_bytes = stream_bytes(*shape, workbench.dtype, count)
    place = workbench.place(done.stream_bytes)
    with done.checking("disk"):
        done.run_bytes = run_bytes(model, config)
        check_disk(done, done.stream_bytes if place == "disk" else 0)
    with done.checking("memory"):
        _require_room(workbench)
        costs = done.costs = probe_block(workbench, config)
        blocks = len(model.blocks)
        done.seconds = Seconds(
            learning_seconds(config, costs, blocks, finished) if finished < blocks else 0.0,
            measuring_seconds(model, config, costs, texts),
        )
        cuda = workbench.device.type == "cuda"
        inside = place == "device" or (place == "host" and not cuda)
        before = 0 if cuda else psutil.Process().memory_info().rss
        done.memory = estimate_memory(model, config, costs, before, workbench.dtype, inside, texts)
        free, where = _free_memory(workbench.device) + before, f"on {workbench.device}"
        done.compare("memory", done.memory.peak, free, where, _MEND)
        if cuda and place == "host":
            free = psutil.virtual_memory().available
            done.compare("memory", done.stream_bytes, free, "on the host", _MEND)


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


def _parameters(model: Model) -> float:
    """Parameters in millions, tied ones once."""
    return sum(tensor.numel() for tensor in model.skeleton.parameters()) / 1e6
