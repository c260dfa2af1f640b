"""Memory of learning one block, counted on tensors without values.

    python benchmarks/block_memory.py [--tokens 2048] [--small]

Runs the package's own start of a block (statistics, searches), a learning step of one sample and
the loss that says which epoch is best, on a device that computes nothing, and counts what is
allocated there: weights as stored and on their way, parameters with what their optimizers keep,
their start and their best, and all of a sample.  Attention is flash attention, products are in
bfloat16, quantizers are not compiled.
"""

from __future__ import annotations

import argparse
from itertools import product

import torch

from gpu.allocations import BACKEND, pretended, without_values
from gpu.shapes import LARGE, SMALL, Shape
from gpu.steps import W4A4, W4A16, Method, bench_of, prepare
from lrquant.learn.fit import copied

GB, MB = 1e9, 1e6
METHODS = (
    W4A16,
    Method("W4A16g128", rounding=True),
    W4A4,
    Method("W4A4", let=True, rounding=True),
    Method("W4A4-r3-hadamard", let=True, rounding=True, lac=True),
    Method("W2A16g64", rounding=True),
)


def main() -> None:
    """Count, and print a row for each shape and method."""
    options = _options()
    pretended()
    unit, name = (MB, "MB") if options.small else (GB, "GB")
    print(f"| block | learned | stored: {name} | start | learning |")
    print("| --- | --- | ---: | ---: | ---: |")
    for shape, method in product((SMALL,) if options.small else LARGE, METHODS):
        sizes = counted(shape, method, options.tokens)
        words = shape.name, method.name, *(f"{size / unit:.1f}" for size in sizes)
        print(f"| {' | '.join(words)} |", flush=True)


def counted(shape: Shape, method: Method, tokens: int) -> tuple[int, int, int]:
    """Bytes of a block as it is stored, and the most that there are at its start and in a step."""
    device, host = torch.device(BACKEND, 0), torch.device("cpu")
    bench = bench_of(shape, method, device, torch.bfloat16, tokens, host)
    with without_values() as allocations:
        prepared = prepare(bench, method, 1, tokens)
        stored = sum(tensor.nbytes for tensor in prepared.view.stored.values())
        start = allocations.most[BACKEND]
        allocations.most.clear()
        start_and_best = [copied(prepared.view.moving) for _ in range(2)]
        prepared.step()
        prepared.held()
        del start_and_best  # which lived until here
        return stored, start, allocations.most[BACKEND]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--small", action="store_true", help="a small block, to try it")
    return parser.parse_args()


if __name__ == "__main__":
    main()
