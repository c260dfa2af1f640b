"""What steps read, on its way to the device while the step before is computed."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lrquant.learn.block_data import BlockData, Fed


def feeds_of(data: BlockData) -> Iterator[list[Fed]]:
    """What this member's batches bring to each step, in order.

    Where hidden states live on the host and steps are computed on CUDA, those of the next step are
    read on a stream of their own.  Before they take memory that stream waits for all that has been
    launched so far, so that nothing is written over that a step still reads.
    """
    steps = range(len(data.shared.counts))
    if not data.inputs.on_host:
        yield from map(data.fed_to, steps)
        return
    aside = torch.cuda.Stream(data.inputs.device)
    coming = _read_aside(data, 0, aside)
    for step in steps:
        feeds = coming
        torch.cuda.current_stream(data.inputs.device).wait_stream(aside)
        if step + 1 < len(steps):
            coming = _read_aside(data, step + 1, aside)
        yield feeds


def _read_aside(data: BlockData, step: int, aside: torch.cuda.Stream) -> list[Fed]:
    aside.wait_stream(torch.cuda.current_stream(data.inputs.device))
    with torch.cuda.stream(aside):
        return data.fed_to(step)
