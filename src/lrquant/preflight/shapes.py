"""Checks that schemes, the model's shapes, the format and the target's kernels go together."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from lrquant.blocks.plan import plan_block, require_groups
from lrquant.config.scheme import Scheme
from lrquant.config.schemes import Schemes
from lrquant.errors import LRQuantError
from lrquant.formats.checkpoint import check_format, checkpoint_dtype
from lrquant.formats.choice import AUTO, NATIVE, formats
from lrquant.formats.format import Format
from lrquant.formats.kernels import check_kernels, fused_matrices
from lrquant.learn.checks import check_grids, check_patterns
from lrquant.model.model import Model
from lrquant.preflight.prospect import Check, Prospect, Said


def patterns(run: Prospect, model: Model) -> Iterator[Said]:
    """Whether every pattern of schemes names a matrix."""
    check_patterns(model, run.plan)
    run.passed.add("schemes")
    yield from ()


def groups(run: Prospect, model: Model) -> Iterator[Check]:
    """Whether groups divide the columns: a check for each number of them that they do not."""
    odd = _odd_groups(model, run.plan.schemes)

    def refuse(reason: str) -> Iterator[Said]:
        raise LRQuantError(reason)

    def all_fit() -> Iterator[Said]:
        check_grids(model, run.plan)
        size = run.plan.schemes.default.group_size
        per = f"groups of {size} divide" if size else "one scale a row of"
        names = {matrix.name for i in range(len(model.blocks)) for matrix in model.matrices(i)}
        run.passed.add("groups")
        yield Said(f"{per} all {len(names)} linears")

    for reason, *others in odd:
        more = f"; nor those of {', '.join(others)}" if others else ""
        yield Check("groups", partial(refuse, reason), more)
    if not odd and "schemes" in run.passed:
        yield Check("groups", all_fit)


def _odd_groups(model: Model, schemes: Schemes) -> list[list[str]]:
    """What is wrong with the groups of matrices, and which others are alike.

    A list for each size of groups that does not divide a width of inputs: the error, then names.
    """
    odd: dict[tuple[int, Scheme], list[str]] = {}
    for index in range(len(model.blocks)):
        stored, block = model.blocks[index].state_dict(), plan_block(model, index, schemes)
        for name, matrix in block.matrices.items():
            columns = matrix.of(stored[matrix.parameter]).shape[1]
            wrong = odd.get((columns, block.schemes[name]))
            if wrong is not None and name not in wrong and name not in wrong[0]:
                wrong.append(name)
            if wrong is not None:
                continue
            try:
                require_groups(name, columns, block.schemes[name])
            except LRQuantError as error:
                odd[columns, block.schemes[name]] = [str(error)]
    return list(odd.values())


def shapes(run: Prospect, model: Model, form: Format) -> Iterator[Check]:
    """What the format and the target's kernels ask of shapes."""
    plan, target = run.plan, run.config.target

    def held() -> Iterator[Said]:
        try:
            check_format(model, plan, form, checkpoint_dtype(model, plan, form))
        except LRQuantError as error:
            if run.config.format != AUTO or target is not None or form.name == NATIVE:
                raise
            run.form = formats()[NATIVE]
            check_format(model, plan, run.form, checkpoint_dtype(model, plan, run.form))
            text = f"{error}: written in the native format ({NATIVE})"
            yield Said(text, "warning", text)
        run.passed.add("format")

    def kernels(target: str) -> Iterator[Said]:
        multiple = check_kernels(model, plan, form, target)
        if multiple > 1:
            yield Said(f"in and out of all linears divide by {multiple}, for {target}")

    def fused() -> Iterator[Said]:
        """Linears that read one norm are fused by runtimes, and so have one scheme."""
        blocks = (fused_matrices(model, index) for index in range(len(model.blocks)))
        fused = dict.fromkeys(each for block in blocks for each in block if len(each) > 1)
        names = [" + ".join(each) for each in fused]
        if names:
            yield Said(f"one scheme for {', '.join(names)}")

    yield Check("format", held)
    if target is not None:
        yield Check("kernels", lambda: kernels(target))
        yield Check("fused", fused)
