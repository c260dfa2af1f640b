"""The time and the memory that the end-to-end stage will take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lrquant.blocks.head import outputs, tokens_at_once
from lrquant.blocks.tuned import tuned_bytes
from lrquant.blocks.view import BlockView
from lrquant.blocks.workbench import shape_view
from lrquant.ingredients.tuning import Tuning
from lrquant.learn.tuning import HELD_SHARE, kept_bytes
from lrquant.preflight.estimate import head_seconds, outer_elements
from lrquant.preflight.kinds import KindCosts
from lrquant.preflight.load import Load
from lrquant.preflight.probe import Clock

_TRIED = 1 << 28  # bytes that are sent to a device to see how long that takes


@dataclass(frozen=True)
class TuningBytes:
    """What the end-to-end stage takes beside the hidden states of all samples.

    `kept` are all blocks and what enters each, where these live, `block` the largest of them, and
    `working` what the device has in any case.
    """

    kept: int
    block: int
    working: int

    def on_device(self, apart: bool) -> int:
        """The device's, of which blocks live `apart` or not."""
        return self.working + (self.block if apart else self.kept)


def tuning_bytes(load: Load, tuning: Tuning, handed: int = 0) -> TuningBytes:
    """What the stage takes, where blocks leave so many bytes a token for later ones.

    working: the head, and beside it the most of a block that is computed, one that is made ready,
    and logits.
    """
    bench, model = load.workbench, load.workbench.model
    every = range(len(model.blocks))
    views = [shape_view(model, index, bench.plan) for index in every]
    sample = math.prod(next(iter(load.batch.inputs[0].values())).shape[:2])
    batches = math.ceil(len(load.batch) / load.learning.micro_batch_size * load.share)
    together = sample * min(load.learning.micro_batch_size, len(load.batch))
    handed = batches * together * handed * 4 // bench.dtype.itemsize
    vocabulary = outputs(model)
    logits = min(tokens_at_once(bench.device, vocabulary), together) * vocabulary * 4 * 6
    head = outer_elements(model)["head"] * bench.dtype.itemsize
    computed = max(_computed(view, load, tuning, batches, together) for view in views)
    ready = max((bench.dtype.itemsize + 5) * _weights(view) + 12 * _largest(view) for view in views)
    return TuningBytes(
        kept_bytes(bench, tuning, batches * together) + handed,
        max(tuned_bytes(view, tuning) for view in views),
        head + handed + max(computed, ready, logits),
    )


def _computed(view: BlockView, load: Load, tuning: Tuning, batches: int, together: int) -> int:
    """Weights, their gradients and those of all own batches, and what a batch leaves to go back.

    Of what experts leave, which is little beside their weights, nothing counts.
    """
    size, weights, largest = load.workbench.dtype.itemsize, _weights(view), _largest(view)
    own = view.matrices
    channels = sum(
        shape.rows + shape.columns
        for name, shape in view.shapes.matrices.items()
        if own[name].expert is None
    )
    passed = 4 * together * channels
    if not tuning.tune_rounding:
        return passed + (size + 4) * weights + 8 * largest
    sums = 0 if batches == 1 else 4 * weights
    if load.processes > 1:
        sums = (batches - 1) * size * weights + 4 * (batches + 1) * largest
    return passed + 2 * size * weights + sums


def _weights(view: BlockView) -> int:
    return sum(tensor.numel() for tensor in view.stored.values())


def _largest(view: BlockView) -> int:
    return max((shape.rows * shape.columns for shape in view.shapes.matrices.values()), default=0)


def tuning_seconds(load: Load, costs: Sequence[KindCosts], tuning: Tuning) -> float:
    """Time of the end-to-end stage: passes of all blocks, forward twice and back once a step."""
    model, held = load.workbench.model, 1 / HELD_SHARE
    total = (
        head_seconds(model, costs)
        * load.rows
        * load.share
        * (tuning.tune_epochs * (5 * (1 - held) + 2 * held) + 2 * held)
    )
    for kind in costs:
        own, batches = kind.costs, load.rows / kind.costs.rows * load.share
        passes = tuning.tune_epochs * (1 - held) * (own.held + own.step)
        passes += (tuning.tune_epochs + 1) * held * own.held + own.full
        total += len(kind.blocks) * (own.read + own.freeze + batches * passes)
    return total


@dataclass(frozen=True)
class Transfers:
    """What goes between a device and the host where all blocks live, in bytes.

    `blocks` are those of all blocks, `states` what enters them in one step.
    """

    blocks: int
    states: int

    def during(self, learned: float, measured: float, kept: int) -> float:
        """In so many steps, measurements of as many samples, and times that blocks are kept.

        A step has each block there twice and back once, and states there and back on the way
        forward, there with a gradient, and a gradient back, on the way through it again.
        """
        blocks = self.blocks * (3 * learned + measured + kept)
        return blocks + self.states * (5 * learned + 2 * measured)


def transfer_seconds(load: Load, tuning: Tuning, samples: int) -> float:
    """Time of the end-to-end stage's transfers, on so many samples, of blocks on the host."""
    bench, model, held = load.workbench, load.workbench.model, 1 / HELD_SHARE
    views = [shape_view(model, index, bench.plan) for index in range(len(model.blocks))]
    steps, epochs = samples / load.learning.batch_size, tuning.tune_epochs
    states = len(views) * round(load.rows / steps * load.share) * model.state_size * 4
    sizes = [tuned_bytes(view, tuning) for view in views]
    moved = Transfers(sum(sizes), states).during(
        epochs * (1 - held) * steps, (epochs + 1) * held * steps, epochs + 1
    )
    return moved * _seconds_a_byte(bench.device, max(sizes))


def _seconds_a_byte(device: torch.device, size: int) -> float:
    """To the device, of a block of that size."""
    block = torch.zeros(min(size, _TRIED), dtype=torch.uint8)
    return Clock(device).repeated(lambda: block.to(device, copy=True)) / len(block)
