"""A model as it is to compute: under its plan with nothing learned, or as a run learned it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lrquant.blocks.runner import Prepare, PreparedBlock, Variant
from lrquant.blocks.view import BlockView
from lrquant.blocks.workbench import Workbench, learned_view
from lrquant.runs.folder import RunFolder


def unlearned(workbench: Workbench) -> Variant:
    """Every block, of the vision tower too, under the bench's plan with nothing learned."""
    tower = workbench.tower
    return Variant(_rounded(workbench.nearest), None if tower is None else _rounded(tower.nearest))


def full_precision(workbench: Workbench) -> Variant:
    """Every block as it is stored."""
    return unlearned(workbench.full_precision)


def as_learned(
    workbench: Workbench, folder: RunFolder, adapted: str | None = None, last: int = 0
) -> Variant:
    """Every block as a run learned it, the `last` ones as they were `adapted` to the text so named.

    A vision tower that the plan does not quantise stays in floating point.
    """
    blocks = _learned(workbench, folder, adapted, last)
    tower = workbench.tower
    if tower is None or workbench.plan.schemes.tower is None:
        return Variant(blocks, unlearned(workbench).tower)
    return Variant(blocks, _learned(tower, folder.tower))


def with_parameters(workbench: Workbench, parameters: Sequence[dict[str, Tensor]]) -> Prepare:
    """Every block with its learned parameters, which are in memory."""

    def prepare(index: int) -> PreparedBlock:
        view = workbench.view(index, workbench.stored(index))
        view.load(parameters[index])
        return _ready(workbench, index, view)

    return prepare


def _rounded(workbench: Workbench) -> Prepare:
    def prepare(index: int) -> PreparedBlock:
        return _ready(workbench, index, workbench.view(index, workbench.stored(index)))

    return prepare


def _learned(
    workbench: Workbench, folder: RunFolder, adapted: str | None = None, last: int = 0
) -> Prepare:
    blocks = len(workbench.model.blocks)

    def prepare(index: int) -> PreparedBlock:
        here = adapted if adapted and index >= blocks - last else None
        return _ready(workbench, index, learned_view(workbench, folder, index, here))

    return prepare


@torch.no_grad()
def _ready(workbench: Workbench, index: int, view: BlockView) -> PreparedBlock:
    return PreparedBlock(workbench.runner(index, view), view.freeze().tensors(view.dtype))
