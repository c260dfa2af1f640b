"""Formats that hold a run, their sizes, and the runtimes that take them."""

from __future__ import annotations

from collections.abc import Mapping

from rich.filesize import decimal

from lrquant.blocks.plan import Plan
from lrquant.config.core import TARGETS
from lrquant.errors import LRQuantError
from lrquant.files.whole import JsonObject
from lrquant.formats.choice import AUTO, choose_format, formats
from lrquant.formats.format import Format
from lrquant.formats.targets import loading_of, refusal_of
from lrquant.measures.numbers import percent
from lrquant.measures.rows import Table
from lrquant.reports.values import Contents
from lrquant.runs.results import Entry, record

RUNTIMES = {
    **{"vllm": "vLLM", "vllm-cpu": "vLLM on CPUs", "transformers": "transformers"},
    "native": "with import lrquant",
}
_AS_LEARNED, _OTHERWISE, _NOT = "as learned", "not everywhere as learned", "–"


def fitting(plan: Plan, asked: str | None, target: str | None, sizes: Entry) -> JsonObject:
    """By format that holds the run its size, and by runtime what it computes, "" where it does not
    load; `written` is the format that the run is written in, or would be by itself."""
    held = record(sizes.get("formats"))
    forms = {n: f for n, f in formats().items() if refusal_of(f, plan) is None}
    if held:
        forms = {name: form for name, form in forms.items() if name in held}
    told = {
        name: {**record(held.get(name)), "runtimes": _of(form, plan)}
        for name, form in forms.items()
    }
    written = _written(plan, asked, target)
    return {"written": written if written in told else next(iter(told), ""), "formats": told}


def _of(form: Format, plan: Plan) -> dict[str, str]:
    loadings = {name: loading_of(form, plan.schemes, name) for name in TARGETS}
    return {n: "" if each.refusal is not None else each.computes for n, each in loadings.items()}


def _written(plan: Plan, asked: str | None, target: str | None) -> str:
    """The name of the format, empty where none does."""
    for name, runtime in ((asked, target), (AUTO, None)):
        if name is not None or runtime is not None:
            try:
                return choose_format(plan, name, runtime).name
            except LRQuantError:
                continue
    return ""


def fitting_table(fits: Contents) -> Table:
    """A row a format: its size, and how each runtime takes it."""
    rows = []
    notes: dict[str, None] = {}
    for name, each in fits["formats"].items():
        taken = [_taken(each["runtimes"].get(runtime, "")) for runtime in RUNTIMES]
        rows.append([name, *_size(each), *taken])
        notes |= dict.fromkeys(
            f"{RUNTIMES.get(runtime, runtime)} with {name} computes {computes}."
            for runtime, computes in each["runtimes"].items()
            if _taken(computes) == _OTHERWISE
        )
    head = ["format", "size", "bits a weight", *RUNTIMES.values()]
    note = "Bits of the quantised linears, scales and zero points counted. – : does not load it. "
    return Table("Formats and runtimes that it fits", head, rows, note + " ".join(notes))


def _taken(computes: str) -> str:
    if not computes:
        return _NOT
    return _AS_LEARNED if computes == "what was learned" else _OTHERWISE


def _size(size: Mapping[str, float]) -> tuple[str, str]:
    if "bytes" not in size:
        return "", ""
    return decimal(round(size["bytes"])), f"{size['bits_per_weight']:.2f}"


def size_in_words(fits: Contents, sizes: Contents) -> tuple[str, str] | None:
    """Before and after, and the bits of a weight, of the format that is written; or None."""
    written = fits["formats"].get(fits["written"], {})
    if not sizes or "bytes" not in written:
        return None
    before, after = sizes["bfloat16_bytes"], written["bytes"]
    sizes_said = f"{decimal(before)} → {decimal(after)}"
    bits = f"{written['bits_per_weight']:.2f} bits a weight of the quantised linears"
    return sizes_said, f"{percent(after / before)} of bfloat16, {bits}, as {fits['written']}"
