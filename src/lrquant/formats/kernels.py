"""A target's kernels and what they ask of linears, fused as runtimes do: sizes, one scheme."""

from __future__ import annotations

from dataclasses import replace

from lrquant.blocks.plan import Plan, plan_block
from lrquant.blocks.workbench import shape_view
from lrquant.config.scheme import Scheme
from lrquant.errors import LRQuantError
from lrquant.formats.format import Format
from lrquant.formats.runtimes import multiplied_in_vllm
from lrquant.learn.checks import parts_of
from lrquant.model.model import Model

FUSING = ("vllm", "vllm-cpu")  # runtimes that make one product of linears that read one norm


def check_kernels(model: Model, plan: Plan, form: Format, target: str) -> int:
    """What divides in and out of all linears, 1 if nothing must; refuses what it does not divide.

    Linears that read one norm are one product in a runtime: their rows count together, and they
    must have one scheme.
    """
    asked = 1
    for part, own in parts_of(model, plan):
        loadings = [form.loading(s, target) for s in own.schemes.every if s.quantizes_weights]
        multiple = max((each.multiple for each in loadings), default=1)
        transforms = any(each.transforms for each in loadings)
        asked = max(asked, multiple)
        for index in range(len(part.blocks)):
            if target in FUSING:
                _require_one_scheme(part, index, own, target)
            if transforms:
                _require_transforms(part, index, own, target)
            _require_multiple(part, index, own, multiple, target)
    return asked


def _require_multiple(model: Model, index: int, plan: Plan, multiple: int, target: str) -> None:
    shapes = shape_view(model, index, plan).shapes.matrices
    odd = [
        f"{' + '.join(names)} ({columns} to {rows})"
        for names in fused_matrices(model, index)
        if any(shapes[name].grid is not None for name in names)
        for rows in [sum(shapes[name].rows for name in names)]
        for columns in [shapes[names[0]].columns]
        if rows % multiple or columns % multiple
    ]
    if odd:
        raise LRQuantError(
            f"--target {target}: needs in and out of every linear divisible by {multiple}: not so "
            f"in {', '.join(odd)}; use another target"
        )


def _require_one_scheme(model: Model, index: int, plan: Plan, target: str) -> None:
    schemes = plan_block(model, index, plan.schemes).schemes
    for names in fused_matrices(model, index):
        several = {schemes[name] for name in names}
        if len(several) > 1:
            best = max(several, key=_precision).name
            flags = " ".join(f"--scheme-for '{name}={best}'" for name in names)
            raise LRQuantError(
                f"--target {target}: {', '.join(names)} of block {index} are one product there and "
                f"take one scheme; the nearest that it holds is {flags}"
            )


def _require_transforms(model: Model, index: int, plan: Plan, target: str) -> None:
    """Refuse Hadamard matrices of linears with biases, and of those that vLLM does not know."""
    view = shape_view(model, index, plan)
    schemes = view.plan.schemes
    rotated = [name for name in view.matrices if schemes[name].hadamard]
    biased = [name for name in rotated if view.matrices[name].bias in view.stored]
    unknown = [name for name in rotated if not multiplied_in_vllm(name, view.matrices)]
    odd = unknown or biased
    if not odd:
        return
    why = "which it finds by no name" if unknown else "as it adds no biases then"
    together = [names for names in fused_matrices(model, index) if {*names} & {*unknown, *biased}]
    left = {name for names in together for name in names}
    flags = [f"--scheme-for '{n}={replace(schemes[n], hadamard=False).name}'" for n in sorted(left)]
    if left >= set(rotated):
        flags = [f"--scheme {replace(plan.schemes.default, hadamard=False).name}"]
    raise LRQuantError(
        f"--target {target}: multiplies what {', '.join(odd)} of block {index} read by no Hadamard "
        f"matrices, {why}; the nearest that it holds is {' '.join(flags)}"
    )


def _precision(scheme: Scheme) -> tuple[int, int, bool, bool]:
    return scheme.weight_bits, scheme.activation_bits, not scheme.symmetric, scheme.hadamard


def fused_matrices(model: Model, index: int) -> list[tuple[str, ...]]:
    """Names of all matrices of a block, those together that runtimes make one product of.

    Those of attention, or of the MLP, that read one norm; and by their names those of a block whose
    norms come after.
    """
    read = {
        fold.module: site.name
        for site in model.sites(index)
        if site.kind == "norm"
        for fold in site.consumers
    }
    fused: dict[tuple[str, str], list[str]] = {}
    for matrix in model.matrices(index):
        inside, _, leaf = matrix.name.rpartition(".")
        product = inside, _TOGETHER.get(leaf, leaf)
        if matrix.name in read:
            product = read[matrix.name], matrix.name.partition(".")[0]
        fused.setdefault(product, []).append(matrix.name)
    return [tuple(names) for names in fused.values()]


_TOGETHER = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv")
_TOGETHER |= dict.fromkeys(("gate_proj", "up_proj"), "gate_up")
