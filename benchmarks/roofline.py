"""What a learning step launches, moves and waits for at real shapes, and what follows from that.

    python benchmarks/roofline.py [--tokens 2048] [--batch-size 1] [--only LLaMA-7B] [--no-parts]

Counts the package's own step on tensors without values (torch's meta device), operation by
operation: bytes are of each operation's inputs and outputs, attention counts as flash attention,
compiled quantizers as one launch that reads its inputs and writes its outputs once, which is the
least they can do.  Milliseconds are predictions from these counts and the cards' data sheets, no
measurement: nothing of this has run on a GPU.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

from gpu.counting import STEPPING, Count, Counter, counting
from gpu.shapes import LARGE, Shape
from gpu.steps import W4A4, W4A16, Method, Prepared, bench_of, compiled, prepare
from lrquant.measures.rows import table

META = torch.device("meta")
SAMPLES, EPOCHS = 128, 20
ADAMW_BYTES = (
    28  # a float32 value: it, its gradient and two moments read, all but the second written
)
ADAMW_LAUNCHES = 2  # of the fused one: its steps, and all values


@dataclass(frozen=True)
class Card:
    """A card by its data sheet, and which share of that real kernels are taken to reach."""

    name: str
    bandwidth: float  # bytes a second
    rate: float  # bfloat16 operations a second
    reached_bandwidth: float = 0.85
    reached_rate: float = 0.65

    def seconds(self, count: Count) -> float:
        """Of one part: products by their operations, all else by its bytes."""
        if count.operations:
            return count.operations / (self.rate * self.reached_rate)
        return count.bytes / (self.bandwidth * self.reached_bandwidth)


CARDS = Card("H100", 3.35e12, 989e12), Card("H200", 4.8e12, 989e12)


def main() -> None:
    """Print the parts of a step, and a row for each shape and method."""
    options = _options()
    shapes = [each for each in LARGE if options.only in (None, each.name)]
    if not options.no_parts:
        counter = counted(shapes[0], W4A4, options.tokens, options.batch_size)
        print(f"{shapes[0].name}, {W4A4.name}, {options.batch_size} x {options.tokens} tokens\n")
        print(table(*_parts(counter, shapes[0])), "\n")
    rows = []
    for shape in shapes:
        for method in (W4A4, W4A16):
            for fused in (False, True):
                counter = counted(shape, method, options.tokens, options.batch_size, fused)
                label = f"{shape.name}, {method.name}{', compiled' if fused else ''}"
                rows.append(_row(label, counter, shape))
    cards = [f"{card.name}: {what}" for what in ("ms a step", "minutes") for card in CARDS]
    print(table(["block", "launches", "waits", "GB", "bytes a weight", "TFLOP", *cards], rows))
    print(
        f"\npredicted, not measured; minutes are those of the steps of {EPOCHS} epochs of "
        f"{SAMPLES} samples over all blocks, without the pass after each epoch and what is between "
        "blocks"
    )


def counted(
    shape: Shape, method: Method, tokens: int, batch: int = 1, fused: bool = False
) -> Counter:
    """One step of a block, counted on tensors without values."""
    bench = bench_of(shape, method, META, torch.bfloat16, tokens)
    prepared = prepare(compiled(bench) if fused else bench, method, batch, tokens, batch)
    with counting(META):
        prepared.view.tensors()  # what the first step alone computes
    stepping = _stepping(prepared)
    prepared.optimizers = []  # torch's fused one takes no tensors without values
    with counting(META) as counter:
        prepared.step()
    counter.counts[STEPPING, "forward"].add(stepping)
    return counter


def _stepping(prepared: Prepared) -> Count:
    values = sum(each.numel() for each in prepared.view.parameters.values())
    return Count(ADAMW_LAUNCHES * len(prepared.optimizers), ADAMW_BYTES * values)


def step_seconds(counter: Counter, card: Card) -> float:
    """What a card is predicted to take for a step, its parts one after the other."""
    return sum(card.seconds(count) for count in counter.counts.values())


def _parts(counter: Counter, shape: Shape) -> tuple[list[str], list[list[str]]]:
    rows = [
        _cells(f"{part}, {direction}" if part != STEPPING else part, count, shape)
        for (part, direction), count in sorted(counter.counts.items())
    ]
    whole = [f"{1e3 * step_seconds(counter, card):.1f}" for card in CARDS]
    rows.append([*_cells("all", counter.total, shape)[: -len(CARDS)], *whole])
    cards = [f"{card.name}: ms" for card in CARDS]
    return ["part", "launches", "GB", "bytes a weight", "TFLOP", *cards], rows


def _cells(label: str, count: Count, shape: Shape) -> list[str]:
    amounts = f"{count.launches}", f"{count.bytes / 1e9:.2f}", f"{count.bytes / shape.weights:.1f}"
    seconds = [f"{1e3 * card.seconds(count):.2f}" for card in CARDS]
    return [label, *amounts, f"{count.operations / 1e12:.3f}", *seconds]


def _row(label: str, counter: Counter, shape: Shape) -> list[str]:
    total, steps = counter.total, shape.blocks * SAMPLES * EPOCHS
    seconds = [step_seconds(counter, card) for card in CARDS]
    amounts = f"{total.bytes / 1e9:.1f}", f"{total.bytes / shape.weights:.0f}"
    times = [f"{1e3 * each:.1f}" for each in seconds]
    minutes = [f"{steps * each / 60:.0f}" for each in seconds]
    counts = f"{total.launches}", f"{counter.waits}"
    return [label, *counts, *amounts, f"{total.operations / 1e12:.2f}", *times, *minutes]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--only", choices=[shape.name for shape in LARGE])
    parser.add_argument("--no-parts", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
