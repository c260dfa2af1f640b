"""Whether scheme, model shapes, format and runtime go together."""

from __future__ import annotations

import dataclasses

from lrquant.export import Format, Loading, choose_format
from lrquant.export.checkpoint import check_format
from lrquant.export.parts import Part
from lrquant.model import Model
from lrquant.preflight.estimate import checkpoint_size
from lrquant.preflight.findings import Preflight
from lrquant.scheme import FLOAT_BITS
from lrquant.workbench import block_shapes


def chosen_format(done: Preflight) -> Format | None:
    """Which format; how the target takes the scheme in it."""
    config = done.config
    if config.save_dir is None and config.target is None and config.format is None:
        done.add("format", "ok", "none: no --save_dir and no --target")
        return None
    with done.checking("format"):
        form = choose_format(config)
        if config.target is None:
            done.add("format", "ok", form.name)
            return form
        done.add("format", "ok", f"{form.name}, which {config.target} loads")
        for note in form.loading(config.quantization, config.target).notes:
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
        sizes = {name: tuple(view.stored[f"{name}.weight"].shape) for name in model.linears}
        _check_kernels(done, form.loading(scheme, config.target), sizes)
        _check_fused(done, model, form)
    if fits:
        with done.checking("packing"):
            size = done.checkpoint = checkpoint_size(model, config, form)
            done.add("packing", "ok", f"{form.name}: {size.bits_per_weight:.3f} bits a weight")
            return True
    return False


def _check_kernels(done: Preflight, loading: Loading, sizes: dict[str, tuple[int, ...]]) -> None:
    """The sizes that a runtime's kernels ask for."""
    if loading.multiple == 1:
        return
    odd = [
        f"{name} ({size[1]} to {size[0]})"
        for name, size in sizes.items()
        if any(width % loading.multiple for width in size)
    ]
    if odd:
        text = f"{loading.where} needs in and out divisible by {loading.multiple}: not so in "
        done.add("kernels", "warning", text + ", ".join(odd))
    else:
        text = f"in and out of all linears divide by {loading.multiple}, for {loading.where}"
        done.add("kernels", "ok", text)


def _check_fused(done: Preflight, model: Model, form: Format) -> None:
    """Linears that read one norm are fused by runtimes, so that their scheme must be the same."""
    outside = form.quantization_config([Part("", done.config.quantization)], []) or {}
    schemes = outside.get("config_groups") or {"all": None}
    sites = model.sites
    fused = [
        " + ".join(fold.module.rpartition(".")[2] for fold in site.consumers)
        for site in sites
        if site.kind == "norm"
    ]
    if fused and len(schemes) > 1:
        text = f"{form.name} writes {len(schemes)} schemes; make sure that none divides "
        done.add("fused", "warning", text + ", ".join(fused))
    elif fused:
        done.add("fused", "ok", f"one scheme for {', '.join(fused)}")
