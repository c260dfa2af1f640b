"""Memory, disk and time of a run: formulas over shapes and a probe's measured costs."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lrquant.blocks.head import outputs, tokens_at_once
from lrquant.blocks.plan import Plan
from lrquant.blocks.view import BlockView
from lrquant.blocks.workbench import shape_view
from lrquant.config.scheme import Scheme
from lrquant.formats.checkpoint import (
    attention_schemes,
    checkpoint_dtype,
    hadamard_sizes,
    linear_schemes,
    model_dtype,
    write_small_files,
)
from lrquant.formats.expected import bits_of_weights, expected_block
from lrquant.formats.format import Format
from lrquant.formats.parts import Part
from lrquant.learn.checks import parts_of
from lrquant.learn.fit import held_steps
from lrquant.learn.starting import TRIED_STEPS, strengths_of
from lrquant.model.model import Model
from lrquant.preflight.kinds import KindCosts
from lrquant.preflight.load import Load, TextLoad
from lrquant.preflight.probe import BlockCosts

_LENGTH = 8  # bytes in front of a safetensors header
_INDEX = 36  # bytes that one tensor takes in the index of shards, beside its name
_HASH = 170  # bytes of one shard's size and hash in lrquant.json
_ORIGIN = 3072  # bytes of the model card, and of what else lrquant.json says
_RECORD = 2048  # bytes of a block's line in blocks.jsonl and of its lines in run.log
_BELONGING = 440  # bytes in front of a block's file: of which run it is, and its losses
_REPORT = 400_000  # bytes of a report, beside
_REPORTED = 240_000  # what a block adds to it and to diagnostics/ (135 M parameters: 238,000)


@dataclass(frozen=True)
class CheckpointSize:
    """Bytes of a checkpoint: its blocks, all else, and bits per weight of the quantised linears.

    `bits_per_weight` counts codes, scales, zero points and shapes of the linears, biases apart.
    """

    blocks: int
    outside: int
    bits_per_weight: float

    @property
    def total(self) -> int:
        """All files together."""
        return self.blocks + self.outside


@dataclass(frozen=True)
class Memory:
    """Bytes at the largest of each phase: embedding the samples, learning, measuring.

    `tower` is the largest of the vision tower's own, `tuning` that of the end-to-end stage; each is
    0 where there is none.
    """

    embedding: int
    learning: int
    measuring: int
    tower: int = 0
    tuning: int = 0

    @property
    def peak(self) -> int:
        """The largest phase."""
        return max(vars(self).values())


@dataclass(frozen=True)
class Seconds:
    """Estimated time of a run, in seconds."""

    learning: float
    measuring: float

    @property
    def total(self) -> float:
        """Both."""
        return self.learning + self.measuring


def stream_bytes(load: Load) -> int:
    """Hidden states between two blocks: ``rows x hidden x bytes`` for each stream of a process.

    Figures of a window's blocks need the states before it once more.
    """
    count = 2 + load.learning.two_branch + (load.learning.window > 1)
    bench = load.workbench
    rows = math.ceil(load.rows * load.share)
    return rows * bench.model.state_size * bench.dtype.itemsize * count


def handed_bytes(load: Load, row: int) -> int:
    """What blocks leave for later ones in every stream, so many bytes a `row`."""
    return math.ceil(load.rows * load.share) * row * (2 + load.learning.two_branch)


def learned_bytes(view: BlockView) -> int:
    """One block's file of learned parameters, from their shapes alone."""
    size = _file_bytes(view.empty_kept().items())
    return size + _BELONGING if size else 0


def run_bytes(model: Model, plan: Plan, report: bool) -> int:
    """A finished run folder: learned parameters, records, and a report of every block."""
    total = _REPORT if report else 0
    for part, own in parts_of(model, plan):
        for index in range(len(part.blocks)):
            block = learned_bytes(shape_view(part, index, own)) + _RECORD
            total += block + (_REPORTED if report else 0)
    return total


def checkpoint_size(model: Model, plan: Plan, form: Format, settings_bytes: int) -> CheckpointSize:
    """What a checkpoint will take, with so many bytes of settings beside it.

    Raises LRQuantError where the format refuses a shape.
    """
    dtype = checkpoint_dtype(model, plan, form)
    total = bits = weights = 0
    parts = []
    for part, own in parts_of(model, plan):
        linears: dict[str, Scheme] = {}
        names: list[str] = []
        attentions: dict[str, Scheme] = {}
        sizes: dict[str, int] = {}
        for index in range(len(part.blocks)):
            view = shape_view(part, index, own)
            view.stored |= view.added
            tensors = expected_block(view, form, dtype, form.alone(view.plan, part.published))
            tensors |= part.published.wide(view.stored)
            prefix = part.block_name(index) + "."
            full = part.published.named({prefix + name: t for name, t in tensors.items()})
            total += _file_bytes(full.items())
            total += sum(len(name) + _INDEX for name in full) + _HASH
            if part is model:
                block_bits, block_weights = bits_of_weights(tensors, view)
                bits, weights = bits + block_bits, weights + block_weights
            linears |= linear_schemes(view.plan, part.published, form)
            attentions |= attention_schemes(part, view.plan)
            sizes |= hadamard_sizes(view, part.published, form)
            names += full
        parts.append(Part(part.architecture.blocks, own.schemes, linears, names, attentions, sizes))
    return CheckpointSize(
        blocks=total,
        outside=_outside_bytes(model, dtype, [part.blocks for part in parts])
        + _small_files(model, plan, form, parts)
        + settings_bytes
        + _ORIGIN,
        bits_per_weight=bits / weights,
    )


def _outside_bytes(model: Model, dtype: torch.dtype, quantized_lists: list[str]) -> int:
    """Tensors outside the quantised blocks as a checkpoint stores them, a tied head once."""
    inside = tuple(path + "." for path in quantized_lists)
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in model.skeleton.state_dict().items()
        if not name.startswith(inside)
    }
    shapes = {name: shape for name, shape in shapes.items() if name not in model.tied_names}
    tensors = {n: torch.empty(shape, dtype=dtype, device="meta") for n, shape in shapes.items()}
    tensors |= {name: model.source.tensor(name) for name in model.source.extra_names()}
    return _file_bytes(tensors.items())


def _small_files(model: Model, plan: Plan, form: Format, parts: list[Part]) -> int:
    """Configuration, tokenizer and what else travels along, written once to be measured."""
    with tempfile.TemporaryDirectory() as folder:
        write_small_files(model, plan, Path(folder), form, parts)
        return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def _file_bytes(tensors: Iterable[tuple[str, Tensor]]) -> int:
    """A safetensors file: its tensors, and a header of their names, shapes and places."""
    header: dict[str, object] = {}
    end = 0
    for name, tensor in tensors:
        offsets = [end, end + tensor.nbytes]
        dtype = "U8" if tensor.dtype == torch.uint8 else "F32"
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        end += tensor.nbytes
    return end + len(json.dumps(header, separators=(",", ":"))) + _LENGTH if header else 0


def estimate_memory(
    load: Load,
    costs: Sequence[KindCosts],
    held: int,
    in_memory: bool,
    measured: TextLoad | None = None,
    handed: int = 0,
) -> Memory:
    """Peak of each phase on a CPU, bytes: what the process has before (`held`), and what is added.

    learning: the most that a probe reached, its one batch of hidden states replaced by all of them.
    embedding: the hidden states and the embedding, in float32 beside its stored form.  measuring:
    the hidden states of the largest text, everything outside the blocks, and logits of as many
    tokens as are made at once, with their logarithms.  Hidden states count where they are
    `in_memory`, and `handed` bytes of each token that blocks leave for later ones.
    """
    model, dtype = load.workbench.model, load.workbench.dtype
    embedded = stream_bytes(load) * in_memory
    streams = embedded + handed_bytes(load, handed)
    texts = [] if measured is None else measured.texts
    tokens = max((text.tokens for text in texts), default=0)
    tokens = tokens if measured is None else math.ceil(tokens / measured.processes)
    against = measured is not None and bool(measured.against)
    kept = 2 if against else 1
    states = tokens * kept * (model.state_size * dtype.itemsize * in_memory + handed)
    stored = model_dtype(model)
    outer = outer_elements(model)
    beside = 0 if stored == torch.float32 else stored.itemsize
    copies = (4 + beside) * outer["embedding"]
    outside = 0
    if measured is not None and tokens:
        vocabulary = outputs(model)
        at_once = min(tokens_at_once(load.workbench.device, vocabulary), measured.seqlen)
        logits = at_once * vocabulary * 4 * (4 if against else 2)
        head = dtype.itemsize * outer["head"] * (dtype != stored) + logits
        outside = max(copies, beside * outer["embedding"] + head)
    reached = max(held, *(each.costs.peak_memory - each.costs.streams for each in costs))
    return Memory(
        embedding=held + embedded + copies,
        learning=reached + streams,
        measuring=held + states + outside,
    )


def outer_elements(model: Model) -> dict[str, int]:
    """Elements outside the blocks: of linears ("head"), of all else ("embedding")."""
    counts = {"embedding": 0, "head": 0}
    tensors = model.skeleton.state_dict()
    for name in model.outer_names():
        owner = model.skeleton.get_submodule(name.rpartition(".")[0])
        counts["head" if isinstance(owner, nn.Linear) else "embedding"] += tensors[name].numel()
    return counts


def learning_seconds(
    load: Load, costs: Sequence[KindCosts], finished: int = 0, with_statistics: bool = False
) -> float:
    """Time to learn the blocks that are not `finished`, and to pass through those that are.

    ``read + batches (observed + held) + start + epochs (batches step) + freeze + batches held`` a
    block; with two branches one full-precision pass more, with `keep_best` one held pass an epoch,
    and as many starts, with a few held passes each, as are tried.  Of experts in groups each group
    has its epochs, and a held pass before them; from the second on all others are quantised anew.
    `with_statistics` says that files give statistics.
    """
    plan, total = load.workbench.plan, 0.0
    observed = plan.needs_statistics or (not with_statistics and plan.reads_statistics)
    for kind in costs:
        own, left = kind.costs, kind.behind(finished)
        batches = load.rows / own.rows * load.share
        passed = own.read + own.freeze + batches * (own.full + own.held)
        total += (len(kind.blocks) - left) * passed
        total += left * _block_seconds(load, own, observed)
    return total


def _block_seconds(load: Load, costs: BlockCosts, observed: bool) -> float:
    """Time to learn one block, with statistics `observed` or not."""
    learning, steps, share = load.learning, load.rows / costs.rows, load.share
    tries = max(1, len(strengths_of(load.workbench.plan.ingredients)))
    block = costs.read + tries * (costs.start + costs.weights) + costs.freeze
    block += share * costs.held * (min(TRIED_STEPS, steps) * tries if tries > 1 else 0)
    block += share * steps * ((costs.observed if observed else costs.full) + 2 * costs.held)
    block += share * steps * costs.full * learning.two_branch
    if costs.step:
        epoch = share * steps * costs.step
        held = held_steps(round(steps), learning.batch_size) or steps
        epoch += (share * held * costs.held + costs.weights) * learning.keep_best
        block += costs.groups * learning.epochs * epoch
        block += (costs.groups - 1) * (share * steps * costs.held + costs.freeze)
    return block


def measuring_seconds(
    model: Model, costs: Sequence[KindCosts], measured: TextLoad, keep_best: bool
) -> float:
    """Time to measure perplexities: passes of every variant, and heads by their share of products.

    Zero-shot tasks are not in it: their number of tokens is the harness's.
    """
    if not measured.texts:
        return 0.0
    head, total = head_seconds(model, costs), 0.0
    for text in measured.texts:
        agreed = text.name in measured.against
        full = measured.compared or agreed
        others = 1 + measured.compared
        tokens = text.tokens / measured.processes
        total += tokens * (full + others + agreed * others) * head
        for kind in costs:
            own, blocks = kind.costs, len(kind.blocks)
            batches = tokens / own.rows
            total += blocks * batches * (full * own.full + others * own.held)
            total += blocks * (full + others) * (own.read + own.freeze)
            if measured.adapting is not None:
                epochs = measured.adapting.epochs
                adapted = own.groups * (epochs * (own.step + keep_best * own.held) + own.held)
                again = kind.behind(len(model.blocks) - measured.adapting.blocks)
                total += batches * (blocks * (own.full + 2 * own.held) + again * adapted)
                total += again * (own.groups - 1) * own.freeze
    return total


def head_seconds(model: Model, costs: Sequence[KindCosts]) -> float:
    """Time of a token in the head, by its share of products: as long each as those of blocks."""
    seconds = sum(len(kind.blocks) * kind.costs.full / kind.costs.rows for kind in costs)
    shapes = [block.state_dict() for block in model.blocks]
    linears = sum(
        matrix.of(own[matrix.parameter]).numel()
        for index, own in enumerate(shapes)
        for matrix in model.matrices(index)
    )
    return seconds * outputs(model) * model.hidden_size / linears
