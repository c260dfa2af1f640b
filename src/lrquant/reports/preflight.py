"""The report of a pre-flight, as lines of text and as values."""

from __future__ import annotations

import dataclasses

from rich.filesize import decimal

from lrquant.blocks.plan import Plan
from lrquant.config.groups import Learning
from lrquant.learn.identity import describe_method
from lrquant.preflight.contents import spans
from lrquant.preflight.findings import Preflight
from lrquant.preflight.kinds import KindCosts

_SHOWN = 4


def preflight_text(preflight: Preflight) -> str:
    """Every check with its outcome, then what the run will need."""
    config = preflight.config
    width = max(len(finding.what) for finding in preflight.findings)
    lines = [
        f"model: {config.model}",
        f"scheme: {config.schemes.describe()}",
        f"method: {describe_method(Plan.of(config.quantizing), config.group(Learning))}",
        "",
        *(
            f"{finding.state:<11}  {finding.what:<{width}}  {finding.text}"
            for finding in preflight.findings
        ),
    ]
    lines += ["", *_contents(preflight)] if preflight.contents else []
    estimates = _estimates(preflight)
    if estimates:
        width = max(map(len, estimates))
        of_each = (
            "" if preflight.processes == 1 else f", of each of {preflight.processes} processes"
        )
        lines += ["", f"estimates, not promises{of_each}:"]
        lines += [f"  {what:<{width}}  {text}" for what, text in estimates.items()]
    return "\n".join(lines)


def preflight_values(preflight: Preflight) -> dict[str, object]:
    """The same as values for JSON: bytes and seconds."""
    estimates: dict[str, object] = {
        name: None
        if (estimate := getattr(preflight, name)) is None
        else dataclasses.asdict(estimate)
        for name in ("checkpoint", "memory", "seconds")
    }
    costs = preflight.costs
    estimates["costs"] = None if costs is None else [dataclasses.asdict(each) for each in costs]
    return {
        "model": preflight.config.model,
        "scheme": preflight.config.schemes.name,
        "target": preflight.config.target,
        "passed": not preflight.failed,
        "processes": preflight.processes,
        "contents": [dataclasses.asdict(each) for each in preflight.contents],
        "carried": preflight.carried,
        "findings": [dataclasses.asdict(finding) for finding in preflight.findings],
        "run_bytes": preflight.run_bytes,
        "stream_bytes": preflight.stream_bytes,
        "tuned_on_host": preflight.tuned_on_host,
        **estimates,
    }


def _contents(preflight: Preflight) -> list[str]:
    """What is quantised, and what is not, by kind of block; then what is carried along."""
    total = sum(len(each.blocks) for each in preflight.contents)
    lines = []
    for kind in preflight.contents:
        count = f"{len(kind.blocks)} of {total}" if len(preflight.contents) > 1 else "all"
        word = "block" if len(kind.blocks) == 1 else "blocks"
        lines.append(f"{word} {spans(kind.blocks)} ({count}):")
        for scheme, tensors in sorted(kind.tensors.items(), reverse=True):
            words = (f"{name} {'x'.join(map(str, shape))}" for name, shape in tensors)
            lines.append(f"  {scheme or 'floating point'}: {', '.join(words)}")
    lines.append("outside the blocks all stays in floating point")
    if preflight.carried:
        names = ", ".join(preflight.carried[:_SHOWN])
        more = f" and {len(preflight.carried) - _SHOWN} more" * (len(preflight.carried) > _SHOWN)
        lines.append(f"carried unchanged, as transformers makes nothing of them: {names}{more}")
    return lines


def _estimates(preflight: Preflight) -> dict[str, str]:
    rows: dict[str, str] = {}
    if preflight.memory is not None:
        memory, on_host = preflight.memory, preflight.tuned_on_host
        others = f", the tower {decimal(memory.tower)}" if memory.tower else ""
        others += f", tuning end to end {decimal(memory.tuning)}" if memory.tuning else ""
        apart = f"; tuning keeps {decimal(on_host)} on the host" if on_host else ""
        rows["peak memory"] = (
            f"{decimal(memory.peak)}: embedding {decimal(memory.embedding)}, learning "
            f"{decimal(memory.learning)}, measuring {decimal(memory.measuring)}{others}; "
            f"hidden states {decimal(preflight.stream_bytes or 0)} of them{apart}"
        )
    if preflight.run_bytes is not None:
        rows["run folder"] = decimal(preflight.run_bytes)
    if preflight.checkpoint is not None:
        size = preflight.checkpoint
        rows["checkpoint"] = (
            f"{decimal(size.total)}: blocks {decimal(size.blocks)} at {size.bits_per_weight:.3f} "
            f"bits a weight with all overheads, all else {decimal(size.outside)}"
        )
    if preflight.seconds is not None and preflight.costs is not None:
        seconds, costs = preflight.seconds, preflight.costs
        rows["time"] = (
            f"{_duration(seconds.total)}: learning {_duration(seconds.learning)}, "
            f"measuring {_duration(seconds.measuring)}"
        )
        rows["measured here"] = "; ".join(_measured(kind, len(costs) > 1) for kind in costs)
    return rows


def _measured(kind: KindCosts, several: bool) -> str:
    """What one batch and block takes, of which blocks where there are `several` kinds."""
    costs, count = kind.costs, len(kind.blocks)
    text = (
        f"a learning step {1e3 * costs.step:.0f} ms, a quantised pass {1e3 * costs.held:.0f} "
        f"ms, a full-precision pass {1e3 * costs.full:.0f} ms a batch and block"
    )
    if not several:
        return text
    if not kind.own:
        return f"{count} of other kinds counted like block {kind.measured}"
    like = "" if count == 1 else f" and {count - 1} like it"
    return f"block {kind.measured}{like}: {text}"


def _duration(seconds: float) -> str:
    """Two figures that mean something: "95 s", "12 min", "3.4 h"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
