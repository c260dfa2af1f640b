"""What a pre-flight found, as lines of text and as values."""

from __future__ import annotations

import dataclasses
from typing import Any

from lrquant.learn.identity import describe_method
from lrquant.preflight.findings import Preflight


def preflight_text(done: Preflight) -> str:
    """Every check with its outcome, then what the run will need."""
    config = done.config
    width = max(len(finding.what) for finding in done.findings)
    lines = [
        f"model: {config.model}",
        f"scheme: {config.quantization.describe()}",
        f"method: {describe_method(config)}",
        "",
        *(
            f"{finding.state:<11}  {finding.what:<{width}}  {finding.text}"
            for finding in done.findings
        ),
    ]
    estimates = _estimates(done)
    if estimates:
        width = max(map(len, estimates))
        lines += ["", "estimates, not promises:"]
        lines += [f"  {what:<{width}}  {text}" for what, text in estimates.items()]
    return "\n".join(lines)


def preflight_values(done: Preflight) -> dict[str, Any]:
    """The same as values for JSON: bytes and seconds."""
    parts = {
        name: None if (part := getattr(done, name)) is None else dataclasses.asdict(part)
        for name in ("checkpoint", "memory", "seconds", "costs")
    }
    return {
        "model": done.config.model,
        "scheme": done.config.scheme,
        "target": done.config.target,
        "passed": not done.failed,
        "findings": [dataclasses.asdict(finding) for finding in done.findings],
        "run_bytes": done.run_bytes,
        "stream_bytes": done.stream_bytes,
        **parts,
    }


def _estimates(done: Preflight) -> dict[str, str]:
    rows: dict[str, str] = {}
    if done.memory is not None:
        memory = done.memory
        tower = f", the tower {_size(memory.tower)}" if memory.tower else ""
        rows["peak memory"] = (
            f"{_size(memory.peak)}: embedding {_size(memory.embedding)}, learning "
            f"{_size(memory.learning)}, measuring {_size(memory.measuring)}{tower}; "
            f"hidden states {_size(done.stream_bytes or 0)} of them"
        )
    if done.run_bytes is not None:
        rows["run folder"] = _size(done.run_bytes)
    if done.checkpoint is not None:
        size = done.checkpoint
        rows["checkpoint"] = (
            f"{_size(size.total)}: blocks {_size(size.blocks)} at {size.bits_per_weight:.3f} bits "
            f"a weight with all overheads, all else {_size(size.outside)}"
        )
    if done.seconds is not None and done.costs is not None:
        costs = done.costs
        rows["time"] = (
            f"{_duration(done.seconds.total)}: learning {_duration(done.seconds.learning)}, "
            f"measuring {_duration(done.seconds.measuring)}"
        )
        rows["measured here"] = (
            f"a learning step {1e3 * costs.step:.0f} ms, a quantised pass {1e3 * costs.held:.0f} "
            f"ms, a full-precision pass {1e3 * costs.full:.0f} ms a batch and block"
        )
    return rows


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    """Two figures that mean something: "95 s", "12 min", "3.4 h"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
