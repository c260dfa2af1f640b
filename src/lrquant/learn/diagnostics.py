"""Figures of one finished block for the report: where its error is made, and what it looks like.

They are taken once a block is learned, over a few samples, and change nothing of the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from lrquant.architectures.matrix import Matrix
from lrquant.blocks.frozen import QuantizedMatrix
from lrquant.blocks.runner import INPUT_FACTOR_SUFFIX, BlockRunner
from lrquant.blocks.view import BlockView
from lrquant.blocks.workbench import Workbench
from lrquant.files.whole import JsonObject
from lrquant.ingredients.ingredient import owner_of
from lrquant.learn.block_data import BlockData
from lrquant.learn.routing import Routing

SAMPLES = 4  # of the calibration set
LINEAR_TOKENS = 256  # of a batch, evenly spaced, for what is measured at linears
PICTURE_TOKENS, PICTURE_CHANNELS = 64, 192  # most cells of a picture of activations
WEIGHT_BINS, WEIGHT_DEVIATIONS = 96, 6.0  # weight histograms span +- 6 standard deviations
VARIANTS = ("round_to_nearest", "learned")


@dataclass(frozen=True)
class BlockDiagnostics:
    """`figures`: numbers as JSON has them, None where one is not finite.

    samples, tokens, linear_tokens: how much was looked at; picture_channels: channels of the inputs
    of which there is a picture, each of the first sample.  By variant (`VARIANTS`, both on the
    block's quantised inputs): loss, as `FitReport` measures it; cosine, the mean over tokens with
    the full-precision block's output; error_made and error, ``|y - r|**2 / |r|**2`` against the
    full-precision block on the same inputs and on its own full-precision inputs.  error_carried:
    the first of these references against the second.  linears, by name: snr, of its output against
    that of the full-precision block on the block's same inputs, and own_snr, against its own
    full-precision product of what it reads, in dB: ``10 log10(|r|**2 / |y - r|**2)``.

    experts, where there are some, by module: tokens of each over the calibration set, kept_start,
    how many were not learned, and changed, the share of tokens' experts that full precision does
    not choose.

    `tensors`: inputs.LINEAR.before and .after (tokens, channels), the largest magnitudes of runs of
    `cell` tokens and channels, bfloat16; weights.LINEAR, counts over +- 6 standard deviations, the
    ends open; codes.LINEAR.VARIANT, counts of each code, all int64.
    """

    figures: JsonObject
    tensors: dict[str, Tensor]


@dataclass
class _Ratio:
    """Energies of a reference and of what differs from it."""

    signal: float = 0.0
    noise: float = 0.0

    def add(self, output: Tensor, reference: Tensor) -> None:
        reference = reference.double()
        self.signal += float(reference.square().sum())
        self.noise += float((output.double() - reference).square().sum())

    @property
    def relative(self) -> float | None:
        return _finite(self.noise / self.signal if self.signal else math.inf)

    @property
    def decibels(self) -> float | None:
        if not (self.signal > 0 and self.noise > 0 and math.isfinite(self.signal + self.noise)):
            return None
        return _finite(10 * math.log10(self.signal / self.noise))


@dataclass
class _Seen:
    """What a block's linears read and gave in one batch: chosen tokens (tokens, in or out)."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    pictures: dict[str, Tensor] = field(default_factory=dict)


class _Variant:
    """A block under one view, and what it adds up to over the batches."""

    def __init__(self, workbench: Workbench, index: int, view: BlockView) -> None:
        self.workbench, self.index, self.view = workbench, index, view
        frozen = view.freeze()
        self.codes = {name: code_counts(matrix) for name, matrix in frozen.matrices.items()}
        # Experts one by one are made of the stored weights: all variants' codes would be held.
        self.tensors = view.tensors() if view.by_expert else frozen.tensors(view.dtype)
        self.made, self.total = _Ratio(), _Ratio()
        self.seen = seen_matrices(view)
        self.snr = {name: _Ratio() for name in self.seen}
        self.own = {name: _Ratio() for name in self.seen}
        self.cosine, self.terms = 0.0, torch.zeros(())
        self.routes: dict[str, list[Tensor]] = {}

    def route(self, name: str, chosen: Tensor) -> None:
        """Take in the experts of one batch's tokens (tokens, chosen)."""
        self.routes.setdefault(name, []).append(chosen)

    @contextmanager
    def watched(self, first: bool) -> Iterator[tuple[BlockRunner, _Seen]]:
        """The running block and what its linears will have seen."""
        seen = _Seen()
        with self.workbench.runner(self.index, self.view) as runner:
            runner.observer = partial(self._read, seen, first)
            handles = [
                runner.block.get_submodule(name).register_forward_hook(
                    lambda module, inputs, output, name=name: seen.outputs.update(
                        {name: _chosen(output)}
                    )
                )
                for name in {str(matrix.reads) for matrix in self.seen.values()}
            ]
            try:
                yield runner, seen
            finally:
                for handle in handles:
                    handle.remove()

    def _read(self, seen: _Seen, first: bool, name: str, values: Tensor) -> None:
        seen.inputs[name] = _chosen(values)
        if first:
            factor = self.tensors.get(name + INPUT_FACTOR_SUFFIX)
            values = values if factor is None else values * factor
            seen.pictures[name] = largest_magnitudes(values if values.dim() == 2 else values[0])

    def add(
        self, output: Tensor, terms: Tensor, homologous: Tensor, target: Tensor, count: int
    ) -> None:
        """Add a batch of `count` samples: its output beside those of the full-precision block on
        the same inputs (`homologous`) and on its own (`target`), and its loss terms."""
        self.made.add(output, homologous)
        self.total.add(output, target)
        cosines = functional.cosine_similarity(output.double(), target.double(), dim=-1)
        self.cosine += float(cosines.mean()) * count
        self.terms = self.terms + terms.double() * count

    def compare(self, seen: _Seen, reference: _Seen) -> None:
        """Add the error of each matrix's output, in the units of the model's own weights."""
        view = self.view
        for name, matrix in self.seen.items():
            module = str(matrix.reads)
            rows = slice(*(matrix.rows or (None,)))
            own, expected = seen.outputs[module][:, rows], reference.outputs[module][:, rows]
            read, output = view.in_stored_units(name, seen.inputs[module], own)
            bias = view.stored.get(str(matrix.bias))
            bias = None if bias is None else matrix.of_bias(bias).float()
            own = functional.linear(read, view.weight(name).float(), bias)
            self.snr[name].add(output, expected)
            self.own[name].add(output, own)


@torch.no_grad()
def measure_block(
    workbench: Workbench,
    view: BlockView,
    data: BlockData,
    measure: Callable[[Tensor], float],
    kind: str,
    routing: Routing | None = None,
) -> BlockDiagnostics:
    """Figures of a learned block whose streams stand before (quantised) and after it (the targets).

    `measure` makes one number of the loss terms of `kind`; `routing` is where the block's tokens go
    under full precision.
    """
    index, stored = data.index, view.stored
    plain = _Variant(workbench, index, workbench.full_precision.view(index, stored))
    nearest = workbench.nearest.view(index, stored)
    variants = dict(
        zip(VARIANTS, (_Variant(workbench, index, each) for each in (nearest, view)), strict=True)
    )
    carried = _Ratio()
    tensors: dict[str, Tensor] = {}
    samples = tokens = linear_tokens = 0
    for batch, rows in enumerate(data.entry.batches):
        if samples >= SAMPLES:
            break
        inputs, target = data.inputs.read(rows, index), data.targets[0].read(rows)
        with plain.watched(first=not batch) as (runner, reference):
            handed = data.inputs.handed_on(rows)
            arguments = data.entry.arguments(batch, index, handed)
            homologous = runner(plain.tensors, inputs, arguments)
        carried.add(homologous, target)
        count = rows.samples.stop - rows.samples.start
        tokens += math.prod(rows.shape)
        for name, variant in variants.items():
            with variant.watched(first=not batch) as (runner, seen):
                runner.router = variant.route
                output, terms = data.fed(batch).terms(runner, variant.tensors, kind)
            variant.compare(seen, reference)
            variant.add(output, terms, homologous, target, count)
            if name == "learned" and not batch:
                tensors |= _pictures(reference.pictures, seen.pictures)
        samples += count
        linear_tokens += len(next(iter(reference.inputs.values())))
    for matrix in view.matrices:
        tensors[f"weights.{matrix}"] = weight_histogram(view.weight(matrix))
    for name, variant in variants.items():
        tensors |= {f"codes.{linear}.{name}": counts for linear, counts in variant.codes.items()}
    figures = {
        "samples": samples,
        "tokens": tokens,
        "linear_tokens": linear_tokens,
        "picture_channels": {
            str(matrix.reads): view.shapes.matrices[name].columns
            for name, matrix in view.matrices.items()
            if f"inputs.{matrix.reads}.before" in tensors
        },
        "error_carried": carried.relative,
    }
    if routing is not None and routing.counts:
        starved = set(map(owner_of, view.still))
        figures["experts"] = routing.figures(variants["learned"].routes, starved)
    return BlockDiagnostics(figures | _sums(variants, samples, measure), tensors)


def _sums(
    variants: dict[str, _Variant], samples: int, measure: Callable[[Tensor], float]
) -> JsonObject:
    return {
        "loss": {
            name: _finite(measure((variant.terms / samples).float()))
            for name, variant in variants.items()
        },
        "cosine": {name: _finite(v.cosine / samples) for name, v in variants.items()},
        "error_made": {name: v.made.relative for name, v in variants.items()},
        "error": {name: v.total.relative for name, v in variants.items()},
        "linears": {
            linear: {
                "snr": {name: v.snr[linear].decibels for name, v in variants.items()},
                "own_snr": {name: v.own[linear].decibels for name, v in variants.items()},
            }
            for linear in variants["learned"].seen
        },
    }


def largest_magnitudes(values: Tensor) -> Tensor:
    """|values| (tokens, channels) as at most `PICTURE_TOKENS` x `PICTURE_CHANNELS` maxima of runs.

    A run has ``ceil(tokens / PICTURE_TOKENS)`` tokens and ``ceil(channels / PICTURE_CHANNELS)``
    channels; the last may be shorter.
    """
    runs = run_lengths(*values.shape)
    pooled = functional.max_pool2d(values.float().abs()[None, None], runs, ceil_mode=True)
    return pooled[0, 0].to("cpu", torch.bfloat16)


def run_lengths(tokens: int, channels: int) -> tuple[int, int]:
    """How many tokens and channels one cell of a picture stands for."""
    return -(-tokens // PICTURE_TOKENS), -(-channels // PICTURE_CHANNELS)


def code_counts(matrix: QuantizedMatrix) -> Tensor:
    """How often each code is used, from the smallest on, (codes,) int64 on the CPU."""
    smallest, largest = matrix.grid.code_range
    codes = matrix.codes.flatten().int() - smallest
    return torch.bincount(codes, minlength=largest - smallest + 1).cpu()


def seen_matrices(view: BlockView) -> dict[str, Matrix]:
    """The matrices whose inputs and outputs are those of a module: linears, and rows of them."""
    return {
        name: matrix
        for name, matrix in view.matrices.items()
        if matrix.reads is not None and matrix.expert is None and not matrix.transposed
    }


def weight_histogram(weight: Tensor) -> Tensor:
    """Counts of the weights in `WEIGHT_BINS` bins of their own standard deviation, int64."""
    values = weight.float()
    scaled = values / values.std().clamp(min=torch.finfo(torch.float32).tiny)
    ends = WEIGHT_DEVIATIONS * (1 - 1e-6)
    width = 2 * WEIGHT_DEVIATIONS / WEIGHT_BINS
    bins = scaled.clamp_(-ends, ends).add_(WEIGHT_DEVIATIONS).div_(width).int()
    return torch.bincount(bins.flatten(), minlength=WEIGHT_BINS).cpu()


def _pictures(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pictures of each input before and after, once for linears that read the same."""
    tensors: dict[str, Tensor] = {}
    pairs: list[tuple[Tensor, Tensor]] = []
    for name in before:
        pair = before[name], after[name]
        if any(all(map(torch.equal, pair, other)) for other in pairs):
            continue
        pairs.append(pair)
        tensors |= {f"inputs.{name}.before": pair[0], f"inputs.{name}.after": pair[1]}
    return tensors


def _chosen(values: Tensor) -> Tensor:
    """At most `LINEAR_TOKENS` evenly spaced tokens of (…, width), float32."""
    flat = values.detach().reshape(-1, values.shape[-1])
    step = -(-len(flat) // LINEAR_TOKENS)
    return flat[::step].float()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
