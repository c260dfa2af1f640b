"""The sizes of linears, fused as runtimes fuse them, that a target's kernels ask for."""

from __future__ import annotations

from lrquant.config.config import Config
from lrquant.errors import LRQuantError
from lrquant.export.format import Format
from lrquant.export.parts import quantized_models
from lrquant.model.model import Model


def check_kernels(model: Model, config: Config, form: Format) -> int:
    """What divides in and out of all linears, 1 if nothing must; refuses what it does not divide.

    Linears that read one norm are one product in a runtime: their rows count together.
    """
    asked = 1
    for part, settings in quantized_models(model, config):
        multiple = form.loading(settings.quantization, config.target or "").multiple
        asked = max(asked, multiple)
        weights = {name: _weight(part, name) for name in part.linears}
        odd = [
            f"{' + '.join(names)} ({columns} to {rows})"
            for names in fused_linears(part)
            for rows in [sum(weights[name][0] for name in names)]
            for columns in [weights[names[0]][1]]
            if rows % multiple or columns % multiple
        ]
        if odd:
            raise LRQuantError(
                f"--target {config.target}: needs in and out of every linear divisible by "
                f"{multiple}: not so in {', '.join(odd)}; use another target"
            )
    return asked


def fused_linears(model: Model) -> list[tuple[str, ...]]:
    """Names of all linears of a block, those together that read one norm."""
    fused = [
        tuple(fold.module for fold in site.consumers) for site in model.sites if site.kind == "norm"
    ]
    inside = {name for names in fused for name in names}
    return [*fused, *((name,) for name in model.linears if name not in inside)]


def _weight(model: Model, linear: str) -> tuple[int, int]:
    rows, columns = model.blocks[0].get_submodule(linear).get_parameter("weight").shape
    return rows, columns
