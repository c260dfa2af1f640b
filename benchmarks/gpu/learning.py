"""Steps of learning: against those of a CPU, and against themselves."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from itertools import product

import torch

from gpu.check import Check, distance
from gpu.shapes import SMALL, Shape
from gpu.steps import W4A4, W4A16, Method, Prepared, bench_of, compiled, prepare
from lrquant.numerics.compiled import why_not

CPU = torch.device("cpu")
STEPS, RUNS = 20, 3
# Of the losses of three steps: where activations have few codes, some fall to another one.
NEAR = {"W4A16g64": 1e-4, "W8A8": 1e-3, "W4A4": 2e-2}
MIDDLE = Shape("middle", 1024, 2816, 8, 4, 1)


def steps(check: Check) -> None:
    """Three steps in float32, on the CPU and on the device."""
    for scheme, near in NEAR.items():
        method = Method(scheme, let=not scheme.startswith("W4A16"))
        both = [_prepared(SMALL, method, each, torch.float32, 64) for each in (CPU, check.device)]
        expected, found = ([float(own.step()) for _ in range(3)] for own in both)
        pairs = zip(found, expected, strict=True)
        apart = max(abs(one - other) / abs(other) for one, other in pairs)
        first, other = (own.view.parameters for own in both)
        farthest = max(distance(other[name], first[name].detach()) for name in first)
        values = f"losses {apart:.1e} apart, parameters {farthest:.1e}"
        check.say(f"{scheme}, three steps against a CPU's", values, apart < near)


def graphs(check: Check) -> None:
    """Steps as CUDA graphs replay them, beside the same taken one by one: the same bytes."""
    if not check.on_cuda:
        check.say(
            "not recorded", f"{check.device} has no CUDA graphs; tests/learn records otherwise"
        )
        return
    compilers = (False, True) if why_not(check.device) is None else (False,)
    for method, fused in product((W4A4, W4A16), compilers):
        name = f"{method.name}{', compiled' if fused else ''}"
        if check.over(name):
            return
        hashes, seconds = [], []
        for replayed in (False, True):
            bench = bench_of(MIDDLE, method, check.device, torch.bfloat16, 2048)
            with bench.learning():
                own = prepare(compiled(bench) if fused else bench, method, 1, 2048)
            step = own.replayed() if replayed else own.step
            for _ in range(STEPS):
                step()
            hashes.append(_hash(own))
            seconds.append(check.timed(step, 8, 0))
        plain, graph = (1e3 * each for each in seconds)
        values = f"{plain:.2f} ms a step, {graph:.2f} ms replayed; equal bytes: "
        right = hashes[0] == hashes[1]
        check.say(f"{STEPS} steps of {name}", values + ("yes" if right else "no"), right)


def repeats(check: Check) -> None:
    """The same steps several times: how many different results there are."""
    shape, tokens = (SMALL, 64) if check.small else (MIDDLE, 2048)
    steps_taken = 2 if check.small else STEPS
    ways = [("all kernels", False, False), ("deterministic kernels", True, False)]
    if why_not(check.device) is None and not check.small:
        ways.append(("deterministic kernels, compiled", True, True))
    for name, deterministic, fused in ways:
        if check.over(name):
            return
        results = set()
        for _ in range(RUNS):
            bench = bench_of(shape, W4A4, check.device, torch.bfloat16, tokens)
            bench = replace(bench, deterministic=deterministic)
            with bench.learning():
                own = prepare(compiled(bench) if fused else bench, W4A4, 1, tokens)
            for _ in range(steps_taken):
                own.step()
            results.add(_hash(own))
        right = len(results) == 1 if deterministic else None
        check.say(f"{name}, {RUNS} runs of {steps_taken} steps", f"{len(results)} different", right)


def _prepared(
    shape: Shape, method: Method, device: torch.device, dtype: torch.dtype, tokens: int
) -> Prepared:
    bench = bench_of(shape, method, device, dtype, tokens, drawn_on=CPU)
    return prepare(bench, method, 1, tokens)


def _hash(own: Prepared) -> str:
    digest = hashlib.sha256()
    for _, each in sorted(own.view.parameters.items()):
        digest.update(each.detach().cpu().numpy().tobytes())
    return digest.hexdigest()
