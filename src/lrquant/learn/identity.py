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
from lrquant.config.groups import Learning, StatisticsFiles
from lrquant.data.samples import Samples
from lrquant.files.whole import JsonObject
from lrquant.model.device import dtype_name
from lrquant.model.model import Model
from lrquant.version import __version__


def describe_method(plan: Plan, learning: Learning) -> str:
    """One line for people: what is learned, how long."""
    learned = [ingredient.description for ingredient in plan.ingredients]
    if not learned:
        return "round to nearest: nothing is learned"
    branches = ", two branches" if learning.two_branch else ""
    weights = f", dynamic weights from {learning.ema_init}" if learning.dynamic_weights else ""
    kept = ", best epoch kept" if learning.keep_best else ""
    epochs = f"{learning.epochs} epoch{'' if learning.epochs == 1 else 's'}"
    groups = f", {learning.expert_group} experts at a time" if learning.expert_group else ""
    return (
        f"{method_name(plan, learning)}: {' and '.join(learned)}; "
        f"loss {learning.loss}{branches}{weights}; {epochs}{kept}{groups}"
    )


def method_name(plan: Plan, learning: Learning) -> str:
    """LRQuant+ with any of its three parts, else LRQuant."""
    plus = any(ingredient.plus for ingredient in plan.ingredients)
    return "LRQuant+" if plus or learning.two_branch or learning.dynamic_weights else "LRQuant"


def describe_run(
    workbench: Workbench,
    learning: Learning,
    calibration: Samples,
    files: StatisticsFiles,
    tuning: Samples | None = None,
) -> JsonObject:
    """What must be the same for a run to be resumed, and in words what is learned from.

    `tuning` are the samples of an end-to-end stage.
    """
    data = {"set": f"{calibration.name}/{calibration.split}", "sha256": calibration.sha256}
    texts = calibration.texts
    if tuning is not None:
        data["tuning_sha256"] = tuning.sha256
        texts |= tuning.texts
    model, plan = workbench.model, workbench.plan
    read = files.named if plan.reads_statistics else ()
    statistics = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in read]
    dtype = None if plan.scale_dtype is None else dtype_name(plan.scale_dtype)
    tower = {}
    if plan.schemes.tower is not None and model.tower is not None:
        blocks, scheme = len(model.tower.blocks), plan.schemes.tower.to_dict()
        tower = {"tower": {"blocks": blocks, "scheme": scheme, "method": _values(plan.tower)}}
    return {
        "model": model.fingerprint(),
        **tower,
        "scheme": plan.schemes.default.to_dict(),
        "schemes": [f"{pattern}={scheme.name}" for pattern, scheme in plan.schemes.patterns],
        "method": _values(plan) | {"save_dtype": dtype},
        "learning": _learning(model, learning),
        "data": data,
        "statistics": statistics,
        "precision": dtype_name(workbench.dtype),
        **({"compiled": True} if workbench.compiled else {}),
        "calibration": calibration.description,
        "texts": sorted(map(list, texts)),
        "begun_on": begun_on(workbench),
    }


def begun_on(workbench: Workbench) -> JsonObject:
    """What decides the last digits of sums beside all that a run's identity says."""
    device = workbench.device
    own = {"deterministic": workbench.deterministic} if device.type == "cuda" else {}
    return {"device": device.type, **machine(device), **own}


def machine(device: torch.device) -> JsonObject:
    """How sums are split: by a CPU's threads and instructions, or by the kind of GPU."""
    if device.type == "cuda":
        return {"gpu": torch.cuda.get_device_name(device)}
    return {"threads": torch.get_num_threads(), "cpu": torch.backends.cpu.get_cpu_capability()}


def gone_on_elsewhere(begun: object, now: JsonObject) -> str | None:
    """What to say of a run that was begun on another machine, or otherwise; None if it was not."""
    if not isinstance(begun, dict) or begun == now:
        return None
    other = [name for name in {**begun, **now} if begun.get(name) != now.get(name)]
    said = (
        f"{name} {now[name]} in place of {begun.get(name)}" if name in now else f"no {name}"
        for name in other
    )
    return (
        f"goes on with {', '.join(said)}: what is still to be learned will differ in its last "
        "digits from what it would have been"
    )


def _learning(model: Model, learning: Learning) -> JsonObject:
    """How blocks are learned; what does not concern the model, or is as usual, is left out."""
    values = dataclasses.asdict(learning)
    if not model.has_experts:
        del values["expert_tokens"], values["expert_group"]
    elif not learning.expert_group:
        del values["expert_group"]
    if learning.micro_batch_size == 1:
        del values["micro_batch_size"]
    return values


def _values(plan: Plan) -> JsonObject:
    """The settings that decide what every ingredient of a part learns, as JSON has them."""
    values: JsonObject = {}
    for each in plan.ingredients:
        own = dataclasses.asdict(each)  # type: ignore[call-overload]
        others = (each.tower_switch, *each.afterwards)
        values |= {name: value for name, value in own.items() if name not in others}
    return json.loads(json.dumps(values))


class Computation(Protocol):
    """Where and in what a model computes."""

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...


def environment(
    model: str, plan: Plan, learning: Learning, seed: int, computation: Computation
) -> JsonObject:
    """What a reader needs to repeat the numbers of `model`, a name."""
    return {
        "model": model,
        "scheme": plan.schemes.name,
        "method": describe_method(plan, learning),
        "method_name": method_name(plan, learning),
        "seed": seed,
        "device": str(computation.device),
        "precision": dtype_name(computation.dtype),
        **machine(computation.device),
        "versions": {
            "lrquant": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "peak_memory_bytes": peak_memory(computation.device),
    }
