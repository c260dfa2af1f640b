"""Whether scheme, model shapes, format and runtime go together."""

from __future__ import annotations

import dataclasses

from lrquant.blocks.workbench import block_shapes
from lrquant.config.scheme import FLOAT_BITS
from lrquant.export.checkpoint import check_format
from lrquant.export.choice import choose_format
from lrquant.export.format import Format
from lrquant.export.kernels import check_kernels, fused_linears
from lrquant.export.targets import loading_of, verdicts
from lrquant.model.model import Model
from lrquant.preflight.estimate import checkpoint_size
from lrquant.preflight.findings import Preflight


def chosen_format(done: Preflight) -> Format | None:
    """Which format; how the target takes the scheme in it."""
    config = done.config
    if config.save_dir is None and config.target is None and config.format is None:
        done.add("format", "ok", "none: no --save_dir and no --target")
        return None
    with done.checking("format"):
        form = choose_format(config)
        by = "" if config.target is None else f", which {config.target} loads"
        done.add("format", "ok", form.name + by)
        for as_learned, text in verdicts(form, config):
            done.add("runtime", "ok" if as_learned else "warning", text)
        if config.target is not None:
            for note in loading_of(form, config, config.target).notes:
                done.add("runtime", "warning", note)
        return form
    return None


def check_shapes(done: Preflight, model: Model, form: Format | None) -> bool:
    """Group sizes, what format and kernels ask of shapes, packing; whether the shapes fit."""
    config = done.config
    scheme = config.quantization
    view = block_shapes(model, dataclasses.replace(scheme, weight_bits=FLOAT_BITS))
    before = len(done.failed)
    by_width: dict[int, list[str]] = {}
    for linear in model.linears if scheme.weight_bits != FLOAT_BITS else ():
        by_width.setdefault(view.stored[f"{linear}.weight"].shape[1], []).append(linear)
    for first, *others in by_width.values():
        with done.checking("groups", f"; nor those of {', '.join(others)}" if others else ""):
            view.group_size(first)
    fits = len(done.failed) == before
    if fits:
        per = f"groups of {scheme.group_size} divide" if scheme.group_size else "one scale a row of"
        done.add("groups", "ok", f"{per} all {len(model.linears)} linears")
    if form is None:
        return fits
    with done.checking("format"):
        check_format(model, config, form)
    if config.target is not None:
        with done.checking("kernels"):
            multiple = check_kernels(model, config, form)
            if multiple > 1:
                text = f"in and out of all linears divide by {multiple}, for {config.target}"
                done.add("kernels", "ok", text)
        _say_fused(done, model)
    if fits:
        with done.checking("packing"):
            size = done.checkpoint = checkpoint_size(model, config, form)
            done.add("packing", "ok", f"{form.name}: {size.bits_per_weight:.3f} bits a weight")
            return True
    return False


def _say_fused(done: Preflight, model: Model) -> None:
    """Linears that read one norm are fused by runtimes; one part of a model has one scheme."""
    fused = [" + ".join(names) for names in fused_linears(model) if len(names) > 1]
    if fused:
        done.add("fused", "ok", f"one scheme for {', '.join(fused)}")
