"""Seconds and memory of blocks at real shapes, and what a whole run of them would take."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.profiler import ProfilerActivity, profile

from gpu.check import Check
from gpu.counting import Count
from gpu.shapes import EIGHT, SEVEN, SEVENTY, SMALL, Shape
from gpu.steps import W4A4, W4A16, Method, Prepared, bench_of, compiled, prepare
from lrquant.numerics.compiled import why_not
from lrquant.numerics.grids.integer import IntegerGrid
from lrquant.numerics.recipe import Recipe
from lrquant.numerics.weights import fake_quantize_weight
from roofline import counted

SAMPLES, TOKENS, EPOCHS = 128, 2048, 20
SEEN = 4  # samples that are really there; memory is filled up to all of them
CASES = (
    *((SEVEN, W4A4, False), (SEVEN, W4A4, True), (SEVENTY, W4A4, True), (EIGHT, W4A16, True)),
    *((SEVEN, W4A16, True), (SEVENTY, W4A16, True), (EIGHT, W4A4, True), (SEVENTY, W4A4, False)),
)


def quantizers(check: Check) -> None:
    """A weight on its grid and its gradient, as it is and compiled."""
    if why_not(check.device) is not None:
        check.say("not compiled", str(why_not(check.device)), None if check.small else False)
        return
    rows, columns = (64, 256) if check.small else (11008, 4096)
    for name, grid, scaled in (
        ("by row", IntegerGrid(4, None, False, torch.bfloat16), True),
        ("groups of 128", IntegerGrid(4, 128, False, torch.bfloat16), False),
    )[: 1 if check.small else 2]:
        both = [
            _round_trip(check.device, rows, columns, grid, scaled, each) for each in (False, True)
        ]
        started = time.perf_counter()
        both[1]()
        check.wait()
        first = time.perf_counter() - started
        plain, fused = map(check.timed, both)
        check.say(
            f"{rows} x {columns}, {name}",
            f"{1e3 * plain:.2f} ms, compiled {1e3 * fused:.2f} ms "
            f"({1e9 * fused / rows / columns:.3f} ns a weight), compiling {first:.0f} s",
        )


def _round_trip(
    device: torch.device, rows: int, columns: int, grid: IntegerGrid, scaled: bool, fused: bool
) -> Callable[[], None]:
    """Forward and backward of one weight under a recipe."""
    uniform = torch.rand(rows, columns, device=device)
    weight, arriving = uniform.sub(0.5).mul(0.1).bfloat16(), uniform.bfloat16()
    groups = columns // grid.size(columns)
    sides = {"upper": (rows, groups), "lower": (rows, groups), "gain": (rows, groups)}
    sides |= {"rows": (rows,), "columns": (columns,)} if scaled else {}
    leaves = {name: torch.full(each, 0.9, device=device) for name, each in sides.items()}
    recipe = Recipe(**{name: each.requires_grad_() for name, each in leaves.items()})

    def run() -> None:
        value = fake_quantize_weight(weight, recipe, grid, torch.bfloat16, compiled=fused)
        torch.autograd.grad(value, list(leaves.values()), arriving)

    return run


@dataclass(frozen=True)
class Times:
    """Seconds of the parts of learning a block; all but `start` and `freeze` are of one sample."""

    step: float
    observed: float
    plain: float
    held: float
    start: float
    freeze: float
    replayed: float | None = None

    def block(self) -> float:
        """A whole block at full settings: two passes in full precision, steps, passes between."""
        passes = self.observed + self.plain + self.held
        step = self.step if self.replayed is None else self.replayed
        return self.start + self.freeze + SAMPLES * (passes + EPOCHS * (step + self.held))


def blocks(check: Check) -> None:
    """Steps and passes of each shape; memory as with all samples on the device."""
    for shape, method, fused in CASES[: 1 if check.small else None]:
        shape, tokens = (SMALL, 64) if check.small else (shape, TOKENS)
        name = f"{shape.name} {method.name}{', compiled' if fused else ''}"
        if check.over(name):
            return
        if fused and why_not(check.device) is not None:
            check.say(name, str(why_not(check.device)), False)
            continue
        with check.peak() as peak:
            own = _prepared(check, shape, method, tokens, fused)
            ballast = _ballast(own)
            started = time.perf_counter()
            own.step()
            check.wait()
            first = time.perf_counter() - started
            times = _times(check, own)
            held = peak()
        if check.on_cuda and fused:
            times = replace(times, replayed=check.timed(own.replayed(), 8))
        del ballast
        minutes = shape.blocks * times.block() / 60
        check.say(
            name,
            f"{1e3 * times.step:.1f} ms a step (first {first:.1f} s){_replayed(times)}, held pass "
            f"{1e3 * times.held:.1f} ms, peak {held:.1f} GB with {SAMPLES} x {tokens} tokens; "
            f"{EPOCHS} epochs extrapolated to {minutes:.0f} min",
        )
        del own
        if check.on_cuda:
            torch.cuda.empty_cache()


def streams(check: Check) -> None:
    """Steps on samples that live on the host, the next read ahead, beside those on the device."""
    shape, tokens = (SMALL, 64) if check.small else (SEVEN, TOKENS)
    fused = why_not(check.device) is None and not check.small
    seconds = {}
    for storage in ("device", "host"):
        bench = replace(
            bench_of(shape, W4A4, check.device, torch.bfloat16, tokens), offload=storage
        )
        own = prepare(compiled(bench) if fused else bench, W4A4, SEEN, tokens)
        seconds[storage] = check.timed(own.epoch, 3, 1) / SEEN
        del own
    here, there = (1e3 * seconds[storage] for storage in ("device", "host"))
    check.say(f"{shape.name} {W4A4.name}", f"{here:.1f} ms a step, samples on the host {there:.1f}")


def _replayed(times: Times) -> str:
    return "" if times.replayed is None else f", {1e3 * times.replayed:.1f} ms as a CUDA graph"


def profiled(check: Check) -> None:
    """Launches, waits and busy time of a step as the profiler sees them, beside what is counted."""
    for fused in (False, True)[: 1 if check.small else 2]:
        if fused and why_not(check.device) is not None:
            continue
        shape, tokens = (SMALL, 64) if check.small else (SEVEN, TOKENS)
        own = _prepared(check, shape, W4A4, tokens, fused)
        seconds = check.timed(own.step, 5)
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if check.on_cuda else [])]
        with profile(activities=kinds) as seen:
            own.step()
            check.wait()
        averages = seen.key_averages()
        launches = sum(each.count for each in averages if "LaunchKernel" in each.key)
        busy = sum(each.self_device_time_total for each in averages) / 1e3
        expected: Count = counted(shape, W4A4, tokens, fused=fused).total
        label = f"{shape.name} {W4A4.name}{', compiled' if fused else ''}"
        check.say(
            label,
            f"{launches} launches ({expected.launches} counted), device busy {busy:.1f} of "
            f"{1e3 * seconds:.1f} ms",
        )
        waits = _waits(own) if check.on_cuda else 0
        check.say(f"{label}: waits of a step", f"{waits}", waits == 0)
        if check.out is not None:
            order = "self_device_time_total" if check.on_cuda else "self_cpu_time_total"
            text = averages.table(sort_by=order, row_limit=60)
            (check.out / f"profile{'-compiled' if fused else ''}.txt").write_text(text)


def _waits(own: Prepared) -> int:
    """How often a step waits for the GPU, by torch's own count."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        own.step()
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(each.message) for each in seen)


def _prepared(check: Check, shape: Shape, method: Method, tokens: int, fused: bool) -> Prepared:
    bench = bench_of(shape, method, check.device, torch.bfloat16, tokens)
    return prepare(compiled(bench) if fused else bench, method, SEEN, tokens)


def _ballast(own: Prepared) -> list[torch.Tensor]:
    """As much memory as the samples take that are not there."""
    if own.bench.device.type == "cpu":
        return []
    sizes = [(SAMPLES // SEEN - 1) * each.nbytes for each in own.streams]
    return [torch.empty(size, dtype=torch.uint8, device=own.bench.device) for size in sizes]


def _times(check: Check, own: Prepared) -> Times:
    samples = len(own.entry.batches)
    step = check.timed(own.step, 8)
    observed = check.timed(lambda: own.advance(own.statistics), 2, 1) / samples
    plain = check.timed(own.advance, 2, 1) / samples
    held = check.timed(own.held, 2, 1) / samples
    freeze = check.timed(own.view.freeze, 2, 1)
    start = check.timed(lambda: own.view.initialize(own.statistics), 1, 0)
    return Times(step, observed, plain, held, start, freeze)
