"""Memory of the end-to-end stage, counted on tensors without values.

    python benchmarks/tuned_memory.py [--tokens 2048] [--batch 1 8] [--small]

Runs the package's own stage, one step and one measurement of it, on a device that computes nothing,
over 4 and over 6 blocks of a published model, and counts what is allocated there and on the host:
each block more takes as much again.  Attention is flash attention, products are in bfloat16.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import replace
from itertools import product

import torch

from gpu.allocations import BACKEND, pretended, without_values
from gpu.shapes import SEVEN, SEVENTY, SMALL, Shape, model_of
from lrquant.blocks.head import Head
from lrquant.blocks.inputs import BlockInputs
from lrquant.blocks.plan import Plan
from lrquant.blocks.tuned import TunedBlock
from lrquant.blocks.workbench import Workbench, advance_full_precision
from lrquant.config.scheme import Scheme
from lrquant.config.schemes import Schemes
from lrquant.data.feeds import Feed
from lrquant.ingredients.base.statistics import ChannelStatistics
from lrquant.ingredients.rounding import Rounding
from lrquant.ingredients.tuning import Tuning
from lrquant.learn.share import Share
from lrquant.learn.whole_model import TunedSamples, WholeFit
from lrquant.team.team import ALONE

GB, MB = 1e9, 1e6
SCHEME = Scheme(4, 16, 128)
FEW, MORE = 4, 6  # blocks
VOCABULARY = {SEVEN.name: 32000, SEVENTY.name: 128256}
METHODS = {
    "scales and norms": Tuning(tune=True),
    "codes too": Tuning(tune=True, tune_rounding=True),
}


def main() -> None:
    """Count, and print a row for each model, method and place."""
    options = _options()
    pretended()
    unit, name = (MB, "MB") if options.small else (GB, "GB")
    print(f"| model | tuned | samples a step | blocks live on | device: {name} | host: {name} |")
    print("| --- | --- | ---: | --- | ---: | ---: |")
    for shape, (what, tuning), batch, offload in product(
        (replace(SMALL, blocks=12),) if options.small else (SEVEN, SEVENTY),
        METHODS.items(),
        options.batch,
        ("device", "host"),
    ):
        sizes = counted(shape, tuning, batch, options.tokens, offload)
        words = shape.name, what, str(batch), offload, *(f"{size / unit:.1f}" for size in sizes)
        print(f"| {' | '.join(words)} |", flush=True)


def counted(
    shape: Shape, tuning: Tuning, batch: int, tokens: int, offload: str
) -> tuple[float, float]:
    """The most bytes of the device's and of the host's memory that tuning a model takes."""
    vocabulary = VOCABULARY.get(shape.name, 256)
    few, more = (
        allocated(replace(shape, blocks=blocks), tuning, batch, tokens, offload, vocabulary)
        for blocks in (FEW, MORE)
    )
    device, host = (
        few[kind] + (shape.blocks - FEW) * (more[kind] - few[kind]) / (MORE - FEW)
        for kind in (BACKEND, "cpu")
    )
    return device, host


def allocated(
    shape: Shape, tuning: Tuning, batch: int, tokens: int, offload: str, vocabulary: int
) -> Counter[str]:
    """The most bytes that were alive on the device and on the host, by kind.

    Hidden states of all samples and the embedding, which stand elsewhere, are not among them.
    """
    device, host = torch.device(BACKEND, 0), torch.device("cpu")
    sizes = {"num_hidden_layers": shape.blocks, "vocab_size": vocabulary}
    model = model_of(shape, host, tokens, **sizes)
    plan = Plan(Schemes(SCHEME), (Rounding(rounding=True),))
    bench = Workbench(model, device, torch.bfloat16, "host", plan=plan)
    with without_values() as allocations:
        samples = _samples(bench, batch, tokens)
        before = allocations.now["cpu"]
        allocations.most.clear()
        home = device if offload == "device" else host
        blocks = [_block(bench, tuning, index, samples).on(home) for index in range(shape.blocks)]
        allocations.most["cpu"] = allocations.now["cpu"]  # reading a block has passed
        head = Head(model, device, torch.bfloat16)
        fit = WholeFit(blocks, head, tuning, samples, samples, lambda step: None)
        for block in blocks:
            block.begin(1)
        fit._keep()
        fit._step(0)
        fit._divergence(samples)
    allocations.most["cpu"] -= before
    return allocations.most


def _samples(bench: Workbench, batch: int, tokens: int) -> TunedSamples:
    feed = Feed.of_tokens(torch.ones((batch, tokens), dtype=torch.long))
    entry = BlockInputs(bench.model, feed, 1, bench.device)
    first, target = bench.streams(entry, 2)
    entry.embed_both(target, first, (None, None))
    return TunedSamples(entry, Share(ALONE, [[batch]], [1 / batch] * batch), first, target)


def _block(bench: Workbench, tuning: Tuning, index: int, samples: TunedSamples) -> TunedBlock:
    """A block that is rounded to nearest, once full precision has gone through it."""
    stored = bench.stored(index)
    advance_full_precision(bench, index, stored, samples.entry, samples.target, samples.target)
    view = bench.view(index, stored)
    view.initialize(ChannelStatistics())
    return TunedBlock(tuning, view, bench.runner(index, view))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--small", action="store_true", help="a small model, to try it")
    return parser.parse_args()


if __name__ == "__main__":
    main()
