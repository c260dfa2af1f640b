"""A model as it is to compute: in full precision, rounded to nearest, or as a run learned it."""

from __future__ import annotations

import torch

from lrquant.blocks.runner import Prepare, PreparedBlock, Variant
from lrquant.blocks.view import BlockView, Method
from lrquant.blocks.workbench import Workbench, learned_view
from lrquant.config.config import Config
from lrquant.config.scheme import FLOATING_POINT, Scheme
from lrquant.runs.folder import RunFolder


def preparer(
    workbench: Workbench,
    scheme: Scheme,
    config: Config | None = None,
    folder: RunFolder | None = None,
    adapted: str | None = None,
    vision: Scheme | None = None,
) -> Variant:
    """How blocks are made ready: under `scheme` alone, or as a run learned them.

    `adapted` names the text to which the last blocks' parameters were adapted.  The tower's blocks
    are in floating point, or under `vision` alone where no run is given.
    """
    if config is not None and folder is not None:
        blocks = _as_learned(workbench, config, folder, adapted)
    else:
        blocks = _under(workbench, scheme)
    tower = workbench.tower
    if tower is None:
        return Variant(blocks)
    if config is not None and folder is not None and config.vision_scheme is not None:
        return Variant(blocks, _as_learned(tower, config.for_tower(), folder.tower))
    return Variant(blocks, _under(tower, vision or FLOATING_POINT))


def _under(workbench: Workbench, scheme: Scheme) -> Prepare:
    """Blocks under a scheme with nothing learned."""

    def prepare(index: int) -> PreparedBlock:
        view = workbench.view(index, workbench.stored(index), scheme, Method())
        return _ready(workbench, index, view)

    return prepare


def _as_learned(
    workbench: Workbench, config: Config, folder: RunFolder, adapted: str | None = None
) -> Prepare:
    """Blocks with a run's parameters, the last ones with those adapted to a text."""
    blocks = len(workbench.model.blocks)

    def prepare(index: int) -> PreparedBlock:
        here = adapted if adapted and is_adapted(config, index, blocks) else None
        return _ready(workbench, index, learned_view(workbench, config, folder, index, here))

    return prepare


@torch.no_grad()
def _ready(workbench: Workbench, index: int, view: BlockView) -> PreparedBlock:
    return PreparedBlock(workbench.runner(index, view), view.freeze().tensors(view.dtype))


def is_adapted(config: Config, index: int, blocks: int) -> bool:
    """Whether test-time adaptation learns block `index` of `blocks` again."""
    return index >= blocks - config.tta_blocks
