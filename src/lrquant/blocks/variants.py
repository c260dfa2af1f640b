"""A model as it is to compute: under its plan with nothing learned, or as a run learned it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lrquant.blocks.runner import Prepare, PreparedBlock, Variant
from lrquant.blocks.view import BlockView
from lrquant.blocks.workbench import Workbench, loaded_view
from lrquant.runs.folder import RunFolder
from lrquant.runs.stages import StageFolder
from lrquant.team.team import ALONE, Team

Parameters = dict[str, Tensor]


def unlearned(workbench: Workbench) -> Variant:
    """Every block, of the vision tower too, under the bench's plan with nothing learned."""
    tower = workbench.tower
    return Variant(_rounded(workbench.nearest), None if tower is None else _rounded(tower.nearest))


def full_precision(workbench: Workbench) -> Variant:
    """Every block as it is stored."""
    return unlearned(workbench.full_precision)


def as_learned(
    workbench: Workbench,
    folder: RunFolder,
    later: StageFolder | None = None,
    last: int = 0,
    team: Team = ALONE,
) -> Variant:
    """Every block as a run learned it, the `last` ones as a `later` stage did.

    A vision tower that the plan does not quantise stays in floating point.  Of a `team` the first
    member alone reads the folder.
    """
    first = len(workbench.model.blocks) - last

    def load(index: int) -> Parameters:
        kept = folder.learned if later is None or index < first else later.load
        return team.first(partial(kept, index))

    blocks, tower = with_parameters(workbench, load), workbench.tower
    if tower is None or workbench.plan.schemes.tower is None:
        return Variant(blocks, unlearned(workbench).tower)
    return Variant(blocks, tower_of(tower, folder, team))


def tower_of(tower: Workbench, folder: RunFolder, team: Team = ALONE) -> Prepare:
    """The blocks of a vision tower as a run learned them.

    Of a team each member has all that was learned at once: one without pictures asks for none.
    """
    load = folder.tower.load_block
    if team.size == 1:
        return with_parameters(tower, load)
    blocks = [team.first(partial(load, index)) for index in range(len(tower.model.blocks))]
    return with_parameters(tower, lambda index: blocks[index])


def with_parameters(workbench: Workbench, load: Callable[[int], Parameters]) -> Prepare:
    """Every block with the learned parameters that `load` has of it."""

    def prepare(index: int) -> PreparedBlock:
        return _ready(workbench, index, loaded_view(workbench, index, load))

    return prepare


def _rounded(workbench: Workbench) -> Prepare:
    def prepare(index: int) -> PreparedBlock:
        return _ready(workbench, index, workbench.view(index, workbench.stored(index)))

    return prepare


@torch.no_grad()
def _ready(workbench: Workbench, index: int, view: BlockView) -> PreparedBlock:
    return PreparedBlock(workbench.runner(index, view), view.frozen_tensors())
