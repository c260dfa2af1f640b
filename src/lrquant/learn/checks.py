"""Whether a model's shapes take what is to be learned, before any weight is read."""

from __future__ import annotations

from lrquant.blocks.workbench import block_shapes
from lrquant.config.config import Config
from lrquant.config.scheme import Scheme
from lrquant.errors import LRQuantError
from lrquant.model.model import Model


def check_groups(model: Model, scheme: Scheme) -> None:
    """Refuse a group size that does not divide before any weight is read."""
    view = block_shapes(model, scheme)
    for linear in model.linears:
        view.group_size(linear)


def check_rank(model: Model, config: Config) -> None:
    """Refuse a rank above which a factor of rows and columns can't be more than it is."""
    if not config.rotation:
        return
    shapes = model.blocks[0].state_dict()
    sides = {linear: min(shapes[f"{linear}.weight"].shape) for linear in model.linears}
    smallest = min(sides, key=sides.__getitem__)
    if config.rotate_rank > sides[smallest]:
        raise LRQuantError(
            f"--rotate_rank {config.rotate_rank}: {smallest} has {sides[smallest]} rows or "
            "columns; use that or less"
        )
