"""Findings of a pre-flight, check by check, and its estimates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from lrquant.config.config import Config
from lrquant.errors import LRQuantError
from lrquant.preflight.contents import Contents
from lrquant.preflight.estimate import CheckpointSize, Memory, Seconds
from lrquant.preflight.kinds import KindCosts

State = Literal["ok", "warning", "failed", "not checked"]
NARROW = 0.9  # of the memory or disk that is free, from which on a need is warned of


@dataclass(frozen=True)
class Finding:
    """One check's outcome, in a sentence."""

    what: str
    state: State
    text: str


@dataclass
class Preflight:
    """All findings, in the order of the checks, and the estimates that could be made.

    `contents` are the blocks' tensors, `carried` those that the model has no place for, which a
    checkpoint gets unchanged.  Memory is that of one of `processes`, each on a device of its own;
    `local_processes` of them are on this machine.  `tuned_on_host` are bytes that the end-to-end
    stage leaves on the host of a GPU: its hidden states, and blocks where they live there.
    """

    config: Config
    processes: int = 1
    findings: list[Finding] = field(default_factory=list)
    local_processes: int = 1
    contents: list[Contents] = field(default_factory=list)
    carried: list[str] = field(default_factory=list)
    checkpoint: CheckpointSize | None = None
    run_bytes: int | None = None
    stream_bytes: int | None = None
    tuned_on_host: int = 0
    memory: Memory | None = None
    costs: list[KindCosts] | None = None
    seconds: Seconds | None = None

    @property
    def failed(self) -> list[Finding]:
        """The checks that a run would not get through."""
        return [finding for finding in self.findings if finding.state == "failed"]

    def add(self, what: str, state: State, text: str) -> None:
        """Note one finding."""
        self.findings.append(Finding(what, state, text))

    def compare(self, what: str, need: int, free: int, where: str, mend: str) -> None:
        """Hold `need` bytes against those that are `free`; `mend` says what would make room."""
        text = f"about {need / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free {where}"
        if need > free:
            self.add(what, "failed", f"{text}: {mend}")
        else:
            self.add(what, "warning" if need > NARROW * free else "ok", text)

    @contextmanager
    def checking(self, what: str, more: str = "") -> Iterator[None]:
        """Turn an error, and what `more` is to be said of it, into a finding, and go on."""
        try:
            yield
        except LRQuantError as error:
            self.add(what, "failed", f"{error}{more}")
        except OSError as error:
            where = f": {error.filename}" if error.filename else ""
            self.add(what, "failed", f"{error.strerror or error}{where}")
