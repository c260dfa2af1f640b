"""The model with all its blocks at once: what asks for it, and where it will lie."""

from __future__ import annotations

from collections.abc import Iterator

from lrquant.blocks.placement import spread, whole_bytes
from lrquant.config.groups import Calibrating
from lrquant.data.samples import written_by_the_model
from lrquant.measures.choice import module_measures
from lrquant.model.model import Model
from lrquant.preflight.prospect import Prospect, Said


def of_whole_model(run: Prospect) -> list[str]:
    """What of a run asks for it, in words."""
    measuring, dataset = run.config.measuring, run.config.group(Calibrating).dataset
    names = [m.name for m in module_measures() if m.asked(measuring[m.settings])]
    if not run.measure_only and run.own_data is None and written_by_the_model(dataset):
        names.append(f"calibration set {dataset}")
    return names


def whole_model(run: Prospect, model: Model, asking: list[str]) -> Iterator[Said]:
    """Where it lies if its device has no room for it; refused where that has too little at all."""
    bench, what = run.workbench, f"the whole model for {', '.join(asking)}"
    if bench is None:
        return
    size = whole_bytes(model, bench.dtype)
    placement = spread(size, bench.device, what=what)
    if placement is None:
        return
    text = f"{what} needs {size}: {placement}"
    if placement.slow:
        text = f"{text}, which each token that is written reads"
        yield Said(text, "warning", text)
    else:
        yield Said(text)
