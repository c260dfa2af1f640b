"""Checks that a model takes what is planned of it, before any weight is read."""

from __future__ import annotations

import torch
import transformers

from lrquant.blocks.plan import Plan
from lrquant.blocks.workbench import Workbench, shape_view
from lrquant.config.schemes import matches
from lrquant.errors import LRQuantError
from lrquant.model.device import dtype_name
from lrquant.model.model import Model
from lrquant.team.team import Team


def parts_of(model: Model, plan: Plan) -> list[tuple[Model, Plan]]:
    """The language part, and a vision tower that has a scheme, each with its own plan."""
    parts = [(model, plan)]
    if plan.schemes.tower is not None:
        parts.append((model.require_tower(), plan.tower))
    return parts


def check_patterns(model: Model, plan: Plan) -> None:
    """Refuse a pattern of schemes that names no matrix, or those of a tower without a scheme."""
    names = [name for part, _ in parts_of(model, plan) for name in part.matrix_names()]
    tower = model.tower.matrix_names() if model.tower is not None else []
    for pattern, scheme in plan.schemes.patterns:
        alone = not any(matches(pattern, name) for name in names)
        if alone and any(matches(pattern, name) for name in tower):
            raise LRQuantError(
                f"--scheme-for {pattern}: names matrices of the vision tower, which has no scheme; "
                f"give one, such as --vision-scheme {scheme.name}"
            )
    plan.schemes.require_used(names)


def check_grids(model: Model, plan: Plan) -> None:
    """Refuse groups that do not divide, and inputs that cannot be quantised, in a part's blocks."""
    for index in range(len(model.blocks)):
        view = shape_view(model, index, plan)
        view.plan.inputs  # noqa: B018


def check_ingredients(model: Model, plan: Plan) -> None:
    """Refuse settings that do not fit the shapes of a part's matrices."""
    for index in range(len(model.blocks)):
        shapes = shape_view(model, index, plan).shapes.quantized
        for ingredient in plan.ingredients:
            ingredient.check(shapes)


def require_alike(team: Team, workbench: Workbench) -> None:
    """Refuse processes of which some would round otherwise: of other devices, software, threads."""
    device = workbench.device
    on_cpu = (torch.backends.cpu.get_cpu_capability(), f"{torch.get_num_threads()} threads")
    own = on_cpu if device.type == "cpu" else (torch.cuda.get_device_name(device),)
    versions = f"torch {torch.__version__}", f"transformers {transformers.__version__}"
    said = team.each(", ".join([dtype_name(workbench.dtype), *own, *versions]))
    for rank, other in enumerate(said):
        if other != said[0]:
            raise LRQuantError(
                f"rank {rank} computes in {other}; rank 0 in {said[0]}: they would learn different "
                "parameters; start all of them alike"
            )


def check_samples(samples: int) -> None:
    """Refuse to tune end to end on one sample, which would have to say when to stop too."""
    if samples < 2:
        raise LRQuantError(
            f"--tune: {samples} calibration sample; give 2 or more, of which some say when to stop"
        )
