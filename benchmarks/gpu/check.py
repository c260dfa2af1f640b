"""One call of `gpu_check.py`: its device, its time, and the rows of what came out."""

from __future__ import annotations

import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lrquant.measures.rows import table

_LONGEST = 110  # characters of an error in a row


@dataclass(frozen=True)
class Row:
    """What a part has to say; `right` is None where nothing is right or wrong."""

    part: str
    what: str
    value: str
    right: bool | None
    seconds: float

    @property
    def verdict(self) -> str:
        """In a word."""
        return {None: "", True: "ok", False: "FAILED"}[self.right]


@dataclass
class Check:
    """Rows so far; `small` sizes try the script without a GPU, `out` is where files go."""

    device: torch.device
    small: bool
    seconds: float
    out: Path | None = None
    part: str = ""
    rows: list[Row] = field(default_factory=list)
    begun: float = field(default_factory=time.monotonic)

    @property
    def on_cuda(self) -> bool:
        """Whether there is a GPU to wait for."""
        return self.device.type == "cuda"

    def over(self, what: str) -> bool:
        """Whether the time of this call is over, which is said of what is then left out."""
        spent = time.monotonic() - self.begun > self.seconds
        if spent:
            self.say(what, f"not begun: {self.seconds:.0f} s are over")
        return spent

    def say(self, what: str, value: str, right: bool | None = None) -> None:
        """Add a row, and print and keep it at once, for whoever is cut off."""
        row = Row(self.part, what, value, right, round(time.monotonic() - self.begun, 1))
        self.rows.append(row)
        print(f"[{row.seconds:5.0f} s] {row.part}: {what}: {value} {row.verdict}", flush=True)
        if self.out is not None:
            rows = json.dumps([vars(each) for each in self.rows], indent=1)
            (self.out / "gpu_check.json").write_text(rows)

    def run(self, name: str, part: Callable[[Check], None]) -> None:
        """Carry out one part; what it raises is a row."""
        self.part = name
        if self.over("all of it"):
            return
        with _Told(self):
            part(self)
        if self.on_cuda:
            torch.cuda.empty_cache()

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.on_cuda:
            torch.cuda.synchronize(self.device)

    def timed(self, function: Callable[[], object], repeats: int = 10, warm: int = 3) -> float:
        """Median seconds of a call, after some that warm up."""
        times = []
        for repeat in range(1 if self.small else repeats + warm):
            self.wait()
            started = time.perf_counter()
            function()
            self.wait()
            if self.small or repeat >= warm:
                times.append(time.perf_counter() - started)
        return statistics.median(times)

    @contextmanager
    def peak(self) -> Iterator[Callable[[], float]]:
        """GB that the device held at most since here; 0 where there is none."""
        if self.on_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        yield lambda: torch.cuda.max_memory_allocated(self.device) / 1e9 if self.on_cuda else 0.0

    @property
    def failed(self) -> list[Row]:
        """Rows of what was wrong."""
        return [row for row in self.rows if row.right is False]

    def summary(self) -> str:
        """All rows as a table."""
        cells = [[row.part, row.what, row.value, row.verdict] for row in self.rows]
        return table(["part", "what", "value", ""], cells)


class _Told:
    """Makes of an exception a row, and goes on; Ctrl-C ends the script."""

    def __init__(self, check: Check) -> None:
        self._check = check

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Exception):
            return False
        traceback.print_exception(error)
        said = " ".join(f"{type(error).__name__}: {error}".split())
        self._check.say("raised", said[:_LONGEST], False)
        return True


def distance(found: Tensor, expected: Tensor) -> float:
    """Norm of a difference, relative to what was expected."""
    found, expected = (each.detach().double().cpu() for each in (found, expected))
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def share_apart(found: Tensor, expected: Tensor) -> float:
    """Share of the elements that are not equal, bit for bit."""
    return float((found.cpu() != expected.cpu()).double().mean())
