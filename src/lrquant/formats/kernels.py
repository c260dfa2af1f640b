"""A target's kernels and what they ask of linears, fused as runtimes do: sizes, one scheme."""

from __future__ import annotations

from dataclasses import replace

from lrquant.blocks.plan import Plan, plan_block
from lrquant.blocks.workbench import shape_view
from lrquant.config.scheme import Scheme
from lrquant.errors import LRQuantError
from lrquant.formats.format import Format
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
        multiples = [
            form.loading(s, target).multiple for s in own.schemes.every if s.quantizes_weights
        ]
        multiple = max(multiples, default=1)
        asked = max(asked, multiple)
        for index in range(len(part.blocks)):
            if target in FUSING:
                _require_one_scheme(part, index, own, target)
                _require_no_biases(part, index, own, target)
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


def _require_no_biases(model: Model, index: int, plan: Plan, target: str) -> None:
    """Refuse biases where vLLM multiplies inputs: its way there asserts that there are none."""
    view = shape_view(model, index, plan)
    odd = [n for n, m in view.matrices.items() if m.bias in view.stored]
    odd = [name for name in odd if view.plan.schemes[name].hadamard]
    if odd:
        together = [names for names in fused_matrices(model, index) if {*names} & {*odd}]
        flags = [
            f"--scheme-for '{name}={replace(view.plan.schemes[name], hadamard=False).name}'"
            for names in together
            for name in names
        ]
        raise LRQuantError(
            f"--target {target}: adds no biases to what it makes of inputs times Hadamard "
            f"matrices, and {', '.join(odd)} of block {index} have such; the nearest that it holds "
            f"is {' '.join(flags)}"
        )


def _precision(scheme: Scheme) -> tuple[int, int, bool]:
    return scheme.weight_bits, scheme.activation_bits, not scheme.symmetric


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
