"""A run's identity, in words for people and in values that decide whether it may be resumed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from pathlib import Path
from typing import Protocol

import torch
import transformers

from lrquant.blocks.plan import Plan
from lrquant.blocks.workbench import Workbench, peak_memory
from lrquant.config.config import Config
from lrquant.data.samples import Samples
from lrquant.files.whole import JsonObject
from lrquant.learn.fit import FitSettings
from lrquant.model.device import dtype_name
from lrquant.model.model import Model
from lrquant.version import __version__


def describe_method(config: Config) -> str:
    """One line for people: what is learned, how long."""
    learned = [ingredient.description for ingredient in Plan.of(config).ingredients]
    if not learned:
        return "round to nearest: nothing is learned"
    branches = ", two branches" if config.two_branch else ""
    weights = f", dynamic weights from {config.ema_init}" if config.dynamic_weights else ""
    kept = ", best epoch kept" if config.keep_best else ""
    return (
        f"{method_name(config)}: {' and '.join(learned)}; loss {config.loss}{branches}{weights}; "
        f"{config.epochs} epoch{'' if config.epochs == 1 else 's'}{kept}"
    )


def method_name(config: Config) -> str:
    """LRQuant+ with any of its three parts, else LRQuant."""
    factors = any(ingredient.plus for ingredient in Plan.of(config).ingredients)
    return "LRQuant+" if factors or config.two_branch or config.dynamic_weights else "LRQuant"


def describe_run(
    config: Config, model: Model, workbench: Workbench, calibration: Samples
) -> JsonObject:
    """What must be the same for a run to be resumed, and `calibration` in words."""
    settings = dataclasses.asdict(fit_settings(config))
    plan = workbench.plan
    read = any(ingredient.reads_statistics for ingredient in plan.ingredients)
    statistics = [
        hashlib.sha256(Path(path).read_bytes()).hexdigest()
        for path in (config.act_scales, config.act_shifts)
        if path is not None and read
    ]
    tower = {}
    if plan.schemes.tower is not None and model.tower is not None:
        blocks, scheme = len(model.tower.blocks), plan.schemes.tower.to_dict()
        tower = {"tower": {"blocks": blocks, "scheme": scheme, "method": _values(plan.tower)}}
    return {
        "model": model.fingerprint(),
        **tower,
        "scheme": plan.schemes.default.to_dict(),
        "schemes": [f"{pattern}={scheme.name}" for pattern, scheme in plan.schemes.patterns],
        "method": _values(plan) | {"save_dtype": config.save_dtype},
        "learning": {**settings, "batch_size": config.batch_size},
        "data": {"set": f"{calibration.name}/{calibration.split}", "sha256": calibration.sha256},
        "statistics": statistics,
        "precision": dtype_name(workbench.dtype),
        "calibration": calibration.description,
    }


def _values(plan: Plan) -> JsonObject:
    """The settings that decide what every ingredient of a part learns, as JSON has them."""
    values: JsonObject = {}
    for each in plan.ingredients:
        own = dataclasses.asdict(each)  # type: ignore[call-overload]
        others = (each.tower_switch, *each.afterwards)
        values |= {name: value for name, value in own.items() if name not in others}
    return json.loads(json.dumps(values))


class Place(Protocol):
    """Where and in what a model computes."""

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...


def environment(config: Config, place: Place) -> JsonObject:
    """What a reader needs to repeat the numbers.

    On a CPU also the threads and instructions that torch uses: sums are split by them.
    """
    on_cpu = {"threads": torch.get_num_threads(), "cpu": torch.backends.cpu.get_cpu_capability()}
    return {
        "model": config.model,
        "scheme": config.schemes.name,
        "method": describe_method(config),
        "method_name": method_name(config),
        "seed": config.seed,
        "device": str(place.device),
        "precision": dtype_name(place.dtype),
        **(on_cpu if place.device.type == "cpu" else {}),
        "versions": {
            "lrquant": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "peak_memory_bytes": peak_memory(place.device),
    }


def fit_settings(config: Config) -> FitSettings:
    """How blocks are learned."""
    return FitSettings(
        epochs=config.epochs,
        window=config.window,
        weight_decay=config.wd,
        loss=config.loss,
        two_branch=bool(config.two_branch),
        dynamic_weights=bool(config.dynamic_weights),
        ema_init=config.ema_init,
        keep_best=config.keep_best,
    )
