"""The closing lines of a run: what came of it, how good it is, and what to type next."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from rich.filesize import decimal

from lrquant.files.manifest import read_manifest
from lrquant.formats.choice import formats
from lrquant.formats.format import Format
from lrquant.formats.targets import loading_of
from lrquant.measures.choice import measures
from lrquant.measures.numbers import duration
from lrquant.measures.rows import RunResults
from lrquant.pipeline import Outcome
from lrquant.preflight.estimate import checkpoint_size
from lrquant.preflight.sizes import BFLOAT16_BYTES
from lrquant.reports.figures import quality

_WIDTH = 11  # of the words that begin a line


def closing_lines(run: Outcome, checkpoint: str | None, seconds: float) -> str:
    """What a person wants to know when a run has ended, a line each."""
    form = None if checkpoint is None else formats()[read_manifest(Path(checkpoint))["format"]]
    lines = [] if checkpoint is None or form is None else list(_sizes(run, checkpoint, form))
    lines += (("quality", text) for text in quality(run.results, run.records))
    lines.append(("time", duration(seconds)))
    report = Path(run.config.output_dir, "report.html")
    beside = f", report: {report}" if run.config.report and report.is_file() else ""
    lines.append(("run folder", f"{run.config.output_dir}{beside}"))
    lines += (
        ("next" if not i else "", text) for i, text in enumerate(_next(run, checkpoint, form))
    )
    return "\n".join(f"{(name + ':' if name else '').ljust(_WIDTH)} {text}" for name, text in lines)


def _sizes(run: Outcome, checkpoint: str, form: Format) -> Iterator[tuple[str, str]]:
    """Where the checkpoint is, how large, and with how many bits a weight."""
    model = run.workbench.model
    after = sum(path.stat().st_size for path in Path(checkpoint).rglob("*") if path.is_file())
    before = BFLOAT16_BYTES * model.parameters
    bits = checkpoint_size(model, run.workbench.plan, form, 0).bits_per_weight
    yield "checkpoint", f"{checkpoint} ({form.name}, {run.workbench.plan.schemes.name})"
    yield (
        "size",
        f"{decimal(before)} in bfloat16 -> {decimal(after)} ({after / before:.0%}), "
        f"{bits:.2f} bits a weight of the quantised linears",
    )


def _next(run: Outcome, checkpoint: str | None, form: Format | None) -> Iterator[str]:
    """Commands that go on from here."""
    folder = shlex.quote(run.config.output_dir)
    if not any(measure.tiles(RunResults(run.results, {"quantized": ""})) for measure in measures()):
        yield f"lrquant evaluate {folder} --ppl wikitext2 --compare"
    if checkpoint is None or form is None:
        yield f"lrquant export {folder} DIR"
        return
    place, schemes = shlex.quote(checkpoint), run.workbench.plan.schemes
    served = loading_of(form, schemes, "vllm")
    if served.refusal is None:
        yield served.command(place)
    yield f"lrquant chat {place}"
