"""Sizes of a run's model: in bfloat16, and in each format that holds what was learned."""

from __future__ import annotations

from lrquant.blocks.workbench import Workbench
from lrquant.errors import LRQuantError
from lrquant.formats.checkpoint import check_format, checkpoint_dtype
from lrquant.formats.choice import formats
from lrquant.formats.format import Format
from lrquant.formats.targets import refusal_of
from lrquant.preflight.estimate import checkpoint_size
from lrquant.runs.results import Json

BFLOAT16_BYTES = 2


def sizes_of(workbench: Workbench) -> dict[str, Json]:
    """What results.json says of sizes: `parameters`, `bfloat16_bytes`, and by format its `bytes`
    and the `bits_per_weight` of the quantised linears, scales and zero points counted."""
    model = workbench.model
    sizes = {name: _size(workbench, form) for name, form in formats().items()}
    return {
        "parameters": model.parameters,
        "bfloat16_bytes": BFLOAT16_BYTES * model.parameters,
        "formats": {name: size for name, size in sizes.items() if size is not None},
    }


def _size(workbench: Workbench, form: Format) -> dict[str, Json] | None:
    """Bytes and bits in one format, None where it cannot hold the model."""
    model, plan = workbench.model, workbench.plan
    if refusal_of(form, plan) is not None:
        return None
    try:
        check_format(model, plan, form, checkpoint_dtype(model, plan, form))
        size = checkpoint_size(model, plan, form, 0)
    except LRQuantError:
        return None
    return {"bytes": size.blocks + size.outside, "bits_per_weight": size.bits_per_weight}
