"""Whether scheme, model shapes, format and runtime go together."""

from __future__ import annotations

from lrquant.blocks.plan import Plan, plan_block, require_groups
from lrquant.config.schemes import Schemes
from lrquant.errors import LRQuantError
from lrquant.export.checkpoint import check_format, checkpoint_dtype
from lrquant.export.choice import choose_format
from lrquant.export.format import Format
from lrquant.export.kernels import check_kernels, fused_matrices
from lrquant.export.targets import loading_of, verdicts
from lrquant.learn.checks import check_grids, check_patterns
from lrquant.model.model import Model
from lrquant.numerics.grids.schemes import weight_grid
from lrquant.preflight.estimate import checkpoint_size
from lrquant.preflight.findings import Preflight


def chosen_format(done: Preflight) -> Format | None:
    """Which format; how the target takes the scheme in it."""
    config = done.config
    if config.save_dir is None and config.target is None and config.format is None:
        done.add("format", "ok", "none: no --save_dir and no --target")
        return None
    with done.checking("format"):
        plan = Plan.of(config)
        form = choose_format(plan, config.format, config.target)
        by = "" if config.target is None else f", which {config.target} loads"
        done.add("format", "ok", form.name + by)
        for as_learned, text in verdicts(form, plan.schemes, config.target):
            done.add("runtime", "ok" if as_learned else "warning", text)
        if config.target is not None:
            for note in loading_of(form, plan.schemes, config.target).notes:
                done.add("runtime", "warning", note)
        return form
    return None


def check_shapes(done: Preflight, model: Model, form: Format | None) -> bool:
    """Group sizes, what format and kernels ask of shapes, packing; whether the shapes fit."""
    config, plan = done.config, Plan.of(done.config)
    before = len(done.failed)
    with done.checking("schemes"):
        check_patterns(model, plan)
    for widths in _by_width(model, plan.schemes):
        first, *others = widths
        with done.checking("groups", f"; nor those of {', '.join(others)}" if others else ""):
            raise LRQuantError(first)
    fits = len(done.failed) == before
    if fits:
        with done.checking("groups"):
            check_grids(model, plan)
            size = plan.schemes.default.group_size
            per = f"groups of {size} divide" if size else "one scale a row of"
            count = len(
                {matrix.name for i in range(len(model.blocks)) for matrix in model.matrices(i)}
            )
            done.add("groups", "ok", f"{per} all {count} linears")
        fits = len(done.failed) == before
    if form is None or not fits:
        return fits
    with done.checking("format"):
        check_format(model, plan, form, checkpoint_dtype(model, plan, form))
    if config.target is not None:
        with done.checking("kernels"):
            multiple = check_kernels(model, plan, form, config.target)
            if multiple > 1:
                text = f"in and out of all linears divide by {multiple}, for {config.target}"
                done.add("kernels", "ok", text)
        _say_fused(done, model)
    with done.checking("packing"):
        settings = len(config.to_yaml().encode())
        size_of_all = done.checkpoint = checkpoint_size(model, plan, form, settings)
        bits = f"{size_of_all.bits_per_weight:.3f} bits a weight"
        done.add("packing", "ok", f"{form.name}: {bits}")
        return True
    return False


def _by_width(model: Model, schemes: Schemes) -> list[list[str]]:
    """What is wrong with the groups of matrices of the first block, and which others are alike.

    A list for each width of inputs that its groups do not divide: the error, then names.
    """
    stored = model.blocks[0].state_dict()
    plan = plan_block(model, 0, schemes)
    odd: dict[int, list[str]] = {}
    for name, matrix in plan.matrices.items():
        columns = matrix.of(stored[matrix.parameter]).shape[1]
        if columns in odd:
            odd[columns].append(name)
            continue
        try:
            require_groups(name, columns, weight_grid(plan.schemes[name]))
        except LRQuantError as error:
            odd[columns] = [str(error)]
    return list(odd.values())


def _say_fused(done: Preflight, model: Model) -> None:
    """Linears that read one norm are fused by runtimes, and so have one scheme."""
    fused = [" + ".join(names) for names in fused_matrices(model, 0) if len(names) > 1]
    if fused:
        done.add("fused", "ok", f"one scheme for {', '.join(fused)}")
