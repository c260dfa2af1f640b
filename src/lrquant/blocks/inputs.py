"""Inputs of a model's blocks: first hidden states, arguments, what is added between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lrquant.blocks.handed import HandedOn
from lrquant.blocks.runner import Prepare
from lrquant.blocks.streams import Stream, batches_of
from lrquant.blocks.stubs import Arguments, stubs
from lrquant.data.feeds import Feed, Inputs, has_pictures
from lrquant.errors import LRQuantError
from lrquant.model.model import Model


class _Recorded(Exception):
    """Ends a forward whose block inputs have all been seen."""


class BlockInputs:
    """What the model hands to its blocks: the first hidden states and every block's arguments.

    `feed` are the model's own inputs, or token ids (samples, tokens).  Arguments are kept per batch
    and per block, and shared by batches for which they are equal.
    """

    def __init__(
        self, model: Model, feed: Feed | Tensor, batch_size: int, device: torch.device
    ) -> None:
        if isinstance(feed, Tensor):
            feed = Feed.of_tokens(feed)
        self.feed = feed if batch_size == 1 else feed.grouped()
        self._arguments: list[list[Arguments]] = []
        self._of_tokens: set[str] = set()  # arguments of which each token has its own: on the host
        self._model, self._device = model, device
        samples = self.feed.slices(batch_size)
        if model.architecture.reads_pixels:
            shapes = self._first_shapes(samples)
        else:
            _check_length(model, max(sample["input_ids"].shape[1] for sample in feed.inputs))
            shapes = [
                (rows.stop - rows.start, self.feed.inputs[rows.start]["input_ids"].shape[1])
                for rows in samples
            ]
        self.batches = batches_of(samples, shapes)
        self.shape = (self.batches[-1].rows.stop, model.state_size)

    def embed(self, stream: Stream, tower: Prepare | None = None) -> None:
        """Fill `stream` with the first block's inputs and record the arguments of all blocks.

        The vision tower in front of the blocks, if there is one, runs as `tower` prepares it.
        """
        pictures = any(map(has_pictures, self.feed.inputs))
        model = self._model
        device = self._device if pictures else torch.device("cpu")
        self._arguments, self._of_tokens = [], set()
        stream.added, stream.handed = {}, {}
        with ExitStack() as stack:
            tensors = model.outer_tensors(device, torch.float32, head=False)
            if pictures:
                tensors |= _buffers(model.skeleton.base_model, device)
            if pictures and model.tower is not None:
                if tower is None:
                    raise LRQuantError("pictures: the vision tower is not prepared")
                tensors |= _entered_tower(model, tower, stack)
            for batch in self.batches:
                seen = self._seen(tensors, self.feed.collate(batch.samples), device)
                stream.write(batch, seen[0][0])
                for block, (added, _) in enumerate(seen[1:], 1):
                    if added.any():
                        stream.added[batch.rows.start, block] = added.flatten(0, -2).to(
                            stream.states.dtype
                        )
                self._keep([arguments for _, arguments in seen], batch.shape)

    def embed_both(
        self, full: Stream, quantized: Stream, towers: tuple[Prepare | None, Prepare | None]
    ) -> None:
        """Fill the streams of both models; `towers` stand before the first block of each."""
        before_full, before_quantized = towers
        self.embed(full, before_full)
        if before_quantized is before_full:
            quantized.copy(full)
        else:
            self.embed(quantized, before_quantized)

    def _seen(
        self, tensors: dict[str, Tensor], inputs: Inputs, device: torch.device
    ) -> list[tuple[Tensor, Arguments]]:
        """What each block is called with when every block before it returns zeros."""
        blocks = self._model.blocks
        seen: list[tuple[Tensor, Arguments]] = []

        def visit(hidden: Tensor, arguments: Arguments) -> Tensor:
            seen.append((hidden, arguments))
            if len(seen) == len(blocks):
                raise _Recorded
            return torch.zeros_like(hidden)

        self._forward(tensors, inputs, device, [visit] * len(blocks))
        return seen

    def _first_shapes(self, samples: Sequence[slice]) -> list[tuple[int, ...]]:
        """Leading shapes of the first block's hidden states, a batch each."""
        shapes: list[tuple[int, ...]] = []

        def visit(hidden: Tensor, arguments: Arguments) -> Tensor:
            shapes.append(tuple(hidden.shape[:-1]))
            raise _Recorded

        cpu = torch.device("cpu")
        tensors = self._model.outer_tensors(cpu, torch.float32, head=False)
        for rows in samples:
            self._forward(tensors, self.feed.collate(rows), cpu, [visit])
        return shapes

    @torch.no_grad()
    def _forward(
        self,
        tensors: dict[str, Tensor],
        inputs: Inputs,
        device: torch.device,
        visits: Sequence[Callable],
    ) -> None:
        model = self._model
        arguments: Arguments = {name: value.to(device) for name, value in inputs.items()}
        if "input_ids" in arguments:
            arguments["use_cache"] = False
        with stubs(model.blocks, visits, model.architecture.in_tuples, model.residuals):
            try:
                functional_call(
                    model.skeleton.base_model, tensors, (), arguments, tie_weights=False
                )
            except _Recorded:
                return
        raise LRQuantError(
            f"model family {model.architecture.name!r}: a forward over the samples ended before "
            f"every block of {model.architecture.blocks} had run; its pictures are missing, or the "
            "declaration does not fit this model"
        )

    def _keep(self, arguments: list[Arguments], shape: tuple[int, ...]) -> None:
        for name, value in (pair for own in arguments for pair in own.items()):
            if isinstance(value, Tensor) and value.is_floating_point():
                self._of_tokens |= {name} if value.shape[:-1] == shape else set()
        moved = [self._moved(own) for own in arguments]
        before = self._arguments[-1] if self._arguments else [{} for _ in moved]
        shared = [_shared(old, own) for old, own in zip(before, moved, strict=True)]
        if all(own is old for old, own in zip(before, shared, strict=True)):
            shared = before
        self._arguments.append(shared)

    def _moved(self, arguments: Arguments) -> Arguments:
        host = torch.device("cpu")
        return {
            name: _to_device(value, host if name in self._of_tokens else self._device)
            for name, value in arguments.items()
        }

    def arguments(self, batch: int, block: int, handed: HandedOn | None = None) -> Arguments:
        """Keyword arguments of one block for one batch; it reads and sets what is `handed` on."""
        arguments, name = self._arguments[batch][block], self._model.architecture.hands_on
        own = {each: arguments[each] for each in self._of_tokens & arguments.keys()}
        if own:
            arguments = {**arguments, **_moved(own, self._device)}
        if name is None:
            return arguments
        return {**arguments, name: HandedOn({}) if handed is None else handed}

    def weights(self, batch: int) -> Tensor | None:
        """How much each token of a batch counts, (samples, tokens) float32; None: all alike."""
        if self._model.architecture.reads_pixels:
            return None
        weights = self.feed.batch_weights(self.batches[batch].samples)
        return None if weights is None else weights.to(self._device)

    def count(self, batch: int) -> float:
        """Tokens of a batch, each as often as its weight says."""
        weights = self.weights(batch)
        tokens = math.prod(self.batches[batch].shape)
        return float(tokens if weights is None else weights.double().sum())


def _check_length(model: Model, tokens: int) -> None:
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and tokens > positions:
        raise LRQuantError(
            f"samples of {tokens} tokens: the model has {positions} positions; use --seqlen "
            f"{positions} or less, or smaller pictures"
        )


def _buffers(module: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """Computed buffers of a module on a device."""
    return {n: b.to(device) for n, b in module.named_buffers() if not b.is_meta}


def _entered_tower(model: Model, prepare: Prepare, stack: ExitStack) -> dict[str, Tensor]:
    """The tower's tensors, named relative to the base model; its hooks are on until `stack` ends.

    The whole tower is in memory.
    """
    tower = model.tower
    assert tower is not None
    base = model.base
    tensors: dict[str, Tensor] = {}
    for index in range(len(tower.blocks)):
        prepared = prepare(index)
        prefix = tower.block_name(index).removeprefix(base) + "."
        own = prepared.runner.bind(prepared.tensors)
        tensors |= {prefix + name: tensor for name, tensor in own.items()}
        stack.enter_context(prepared.runner)
    return tensors


def _moved(arguments: Arguments, device: torch.device) -> Arguments:
    return {name: _to_device(value, device) for name, value in arguments.items()}


def _to_device(value: object, device: torch.device) -> object:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_to_device(each, device) for each in value)
    if isinstance(value, dict):
        return {key: _to_device(each, device) for key, each in value.items()}
    return value


def _shared(before: Arguments, own: Arguments) -> Arguments:
    """The same, with what equals the arguments before taken from there."""
    equal = {name for name in before.keys() & own.keys() if _equal(before[name], own[name])}
    if len(equal) == len(own) == len(before):
        return before
    return {name: before[name] if name in equal else value for name, value in own.items()}


def _equal(left: object, right: object) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return type(left) is type(right) and torch.equal(left, right)
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return False
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_equal(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(_equal, left, right))
    return left == right
