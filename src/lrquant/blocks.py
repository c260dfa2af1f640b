"""Running a model block by block: the first block's inputs, one block's forward, the head."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PretrainedConfig

from lrquant.attention import attention_name
from lrquant.errors import LRQuantError
from lrquant.feeds import Feed, Inputs, has_pictures
from lrquant.model import Model
from lrquant.numerics.affine import fake_quantize_tokens
from lrquant.scheme import FLOAT_BITS, Scheme
from lrquant.streams import Stream, batches_of

SHIFT_SUFFIX = ".shift"  # tensors named so are added to the output of a norm that has no bias
INPUT_FACTOR_SUFFIX = ".input_factor"  # and these multiply the input of a linear
Observer = Callable[[str, Tensor], None]


class _Stub(nn.Module):
    """Stands in a block's place, answers for its attributes, and passes its inputs to `visit`."""

    def __init__(self, block: nn.Module, visit: Callable[[Tensor, dict[str, Any]], Tensor]) -> None:
        super().__init__()
        self.__dict__.update(block=block, visit=visit)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def forward(self, hidden_states: Tensor, *positional: Any, **arguments: Any) -> Tensor:
        """Arguments that the model gives by position are passed on by their names."""
        names = list(inspect.signature(self.__dict__["block"].forward).parameters)[1:]
        named = dict(zip(names, positional, strict=False))
        return self.visit(hidden_states, named | arguments)


@contextmanager
def stubs(blocks: nn.ModuleList, visits: Sequence[Callable]) -> Iterator[None]:
    """Blocks that are not run: each calls its visit with (hidden states, arguments) instead."""
    originals = list(blocks)
    try:
        for index, visit in enumerate(visits):
            blocks[index] = _Stub(originals[index], visit)
        yield
    finally:
        for index, block in enumerate(originals):
            blocks[index] = block


class _Recorded(Exception):
    """Ends a forward whose block inputs have all been seen."""


@dataclass(frozen=True)
class PreparedBlock:
    """A block ready to run: its runner (not yet entered) and the tensors it computes with."""

    runner: BlockRunner
    tensors: dict[str, Tensor]


Prepare = Callable[[int], PreparedBlock]


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
        self._arguments: list[list[dict[str, Any]]] = []
        self._model, self._device = model, device
        samples = self.feed.slices(batch_size)
        if model.architecture.reads_pixels:
            shapes = [self._first_shape(part) for part in samples]
        else:
            _check_length(model, max(sample["input_ids"].shape[1] for sample in feed.inputs))
            shapes = [
                (part.stop - part.start, self.feed.inputs[part.start]["input_ids"].shape[1])
                for part in samples
            ]
        self.batches = batches_of(samples, shapes)
        self.shape = (self.batches[-1].rows.stop, model.hidden_size)

    def embed(self, stream: Stream, tower: Prepare | None = None) -> None:
        """Fill `stream` with the first block's inputs and record the arguments of all blocks.

        The vision tower in front of the blocks, if there is one, runs as `tower` prepares it.
        """
        pictures = any(map(has_pictures, self.feed.inputs))
        model = self._model
        device = self._device if pictures else torch.device("cpu")
        self._arguments = []
        stream.added = {}
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
                self._keep([_to_device(arguments, self._device) for _, arguments in seen])

    def _seen(
        self, tensors: dict[str, Tensor], inputs: Inputs, device: torch.device
    ) -> list[tuple[Tensor, dict[str, Any]]]:
        """What each block is called with when every block before it returns zeros."""
        blocks = self._model.blocks
        seen: list[tuple[Tensor, dict[str, Any]]] = []

        def visit(hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
            seen.append((hidden, arguments))
            if len(seen) == len(blocks):
                raise _Recorded
            return torch.zeros_like(hidden)

        self._forward(tensors, inputs, device, [visit] * len(blocks))
        return seen

    def _first_shape(self, samples: slice) -> tuple[int, ...]:
        """Leading shape of the first block's hidden states."""
        found: list[tuple[int, ...]] = []

        def visit(hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
            found.append(tuple(hidden.shape[:-1]))
            raise _Recorded

        cpu = torch.device("cpu")
        tensors = self._model.outer_tensors(cpu, torch.float32, head=False)
        self._forward(tensors, self.feed.collate(samples), cpu, [visit])
        return found[0]

    @torch.no_grad()
    def _forward(
        self,
        tensors: dict[str, Tensor],
        inputs: Inputs,
        device: torch.device,
        visits: Sequence[Callable],
    ) -> None:
        model = self._model
        arguments: dict[str, Any] = {name: value.to(device) for name, value in inputs.items()}
        if "input_ids" in arguments:
            arguments["use_cache"] = False
        with stubs(model.blocks, visits):
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

    def _keep(self, arguments: list[dict[str, Any]]) -> None:
        if self._arguments and _equal(self._arguments[-1], arguments):
            arguments = self._arguments[-1]
        self._arguments.append(arguments)

    def arguments(self, batch: int, block: int) -> dict[str, Any]:
        """Keyword arguments of one block for one batch."""
        return self._arguments[batch][block]

    def weights(self, batch: int) -> Tensor | None:
        """How much each token of a batch counts, (samples, tokens) float32; None: all alike."""
        if self._model.architecture.reads_pixels:
            return None
        found = self.feed.batch_weights(self.batches[batch].samples)
        return None if found is None else found.to(self._device)


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
    base = model.skeleton.base_model_prefix + "."
    tensors: dict[str, Tensor] = {}
    for index in range(len(tower.blocks)):
        prepared = prepare(index)
        prefix = tower.block_name(index).removeprefix(base) + "."
        own = prepared.runner.bind(prepared.tensors)
        tensors |= {prefix + name: tensor for name, tensor in own.items()}
        stack.enter_context(prepared.runner)
    return tensors


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_to_device(part, device) for part in value)
    if isinstance(value, dict):
        return {key: _to_device(part, device) for key, part in value.items()}
    return value


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return type(left) is type(right) and torch.equal(left, right)
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_equal(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(_equal, left, right))
    return left == right


class BlockRunner:
    """One block's forward with given tensors; a context manager that holds the hooks.

    The residual stream and the norms are float32; what a linear or the attention reads is first
    quantised as `scheme` says, then cast to `dtype`, in which matrix products run.  Consumers of
    one tensor share its quantised form.  `shifted` names norms without a bias whose output takes a
    shift; a linear that has an input factor reads its input times that; `observer` is told (linear,
    unquantised input (batch, tokens, in)).
    """

    def __init__(
        self,
        block: nn.Module,
        linears: Sequence[str],
        scheme: Scheme,
        dtype: torch.dtype,
        shifted: Sequence[str] = (),
        observer: Observer | None = None,
    ) -> None:
        self.block, self.linears, self.shifted = block, linears, shifted
        self.config = _attention_config(block)
        self.scheme, self.dtype, self.observer = scheme, dtype, observer
        self._handles: list[Any] = []
        self._last: tuple[Tensor, Tensor] | None = None
        self._leading = torch.Size((0, 0))
        self._extras: dict[str, Tensor] = {}

    def __enter__(self) -> BlockRunner:
        for name in self.linears:
            linear = self.block.get_submodule(name)
            self._handles.append(linear.register_forward_pre_hook(partial(self._before, name)))
        for name in self.shifted:
            norm = self.block.get_submodule(name)
            self._handles.append(norm.register_forward_hook(partial(self._after_norm, name)))
        self._handles.append(self.block.register_forward_hook(self._after_block))
        self._attention_before = self.config._attn_implementation
        self.config._attn_implementation = attention_name(self.scheme, self.dtype)
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.config._attn_implementation = self._attention_before

    def __call__(
        self, tensors: dict[str, Tensor], hidden_states: Tensor, arguments: dict[str, Any]
    ) -> Tensor:
        """Block output (batch, tokens, hidden), float32, with `tensors` in place of parameters.

        Hidden states of packed pictures are (patches, hidden).
        """
        self._leading = hidden_states.shape[:-1]
        output = functional_call(self.block, self.bind(tensors), (hidden_states,), arguments)
        return output[0] if isinstance(output, tuple) else output

    def bind(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Keep what the hooks apply among `tensors`; the rest are the block's parameters."""
        suffixes = SHIFT_SUFFIX, INPUT_FACTOR_SUFFIX
        self._extras = {name: t for name, t in tensors.items() if name.endswith(suffixes)}
        return {name: t for name, t in tensors.items() if name not in self._extras}

    def on(self, block: nn.Module) -> BlockRunner:
        """The same hooks for another block of the same shape."""
        return BlockRunner(block, self.linears, self.scheme, self.dtype, self.shifted)

    def _before(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        (values,) = inputs
        if self.observer is not None:
            flattened = values.dim() == 2 and len(values) == self._leading.numel()
            self.observer(name, values.unflatten(0, self._leading) if flattened else values)
        factor = self._extras.get(name + INPUT_FACTOR_SUFFIX)
        if factor is not None:
            return (self._quantized(values * factor),)
        if self._last is None or self._last[0] is not values:
            self._last = values, self._quantized(values)
        return (self._last[1],)

    def _quantized(self, values: Tensor) -> Tensor:
        """What a linear multiplies, in the products' dtype."""
        scheme = self.scheme
        if scheme.activation_bits == FLOAT_BITS:
            return values.to(self.dtype)
        return fake_quantize_tokens(
            values, scheme.activation_bits, scheme.activation_symmetric, self.dtype
        )

    def _after_norm(self, name: str, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output + self._extras[name + SHIFT_SUFFIX]

    def _after_block(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._last = None


def _attention_config(block: nn.Module) -> PretrainedConfig:
    """The configuration from which a block's attention takes its implementation."""
    found = [getattr(module, "config", None) for module in block.modules()]
    return next(config for config in found if isinstance(config, PretrainedConfig))


class Head:
    """Everything after the last block: final norm and head, on hidden states."""

    def __init__(self, model: Model, device: torch.device, dtype: torch.dtype) -> None:
        self._model, self._device = model, device
        self._tensors = model.outer_tensors(device, dtype, head=True)

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """Logits (batch, tokens, vocabulary), or (batch, classes) of a classifier.

        Of final hidden states (batch, tokens, hidden).
        """
        model = self._model
        visits = [lambda hidden, arguments: hidden_states] * len(model.blocks)
        handles = cast_outer_linears(model.skeleton, model.block_lists)
        try:
            with torch.no_grad(), stubs(model.blocks, visits):
                return functional_call(
                    model.skeleton,
                    self._tensors,
                    (),
                    self._inputs(hidden_states),
                    tie_weights=False,
                ).logits
        finally:
            for handle in handles:
                handle.remove()

    def _inputs(self, hidden_states: Tensor) -> dict[str, Any]:
        """Inputs whose only use is that the model has some."""
        if self._model.architecture.reads_pixels:
            config = self._model.config
            shape = len(hidden_states), config.num_channels, config.image_size, config.image_size
            return {"pixel_values": torch.zeros(shape, device=self._device)}
        ids = torch.zeros(hidden_states.shape[:2], dtype=torch.long, device=self._device)
        return {"input_ids": ids, "use_cache": False}


def cast_outer_linears(module: nn.Module, block_lists: Sequence[str]) -> list[Any]:
    """Hook every linear outside the blocks to cast its input to its weight's dtype."""
    inside = tuple(path + "." for path in block_lists)

    def cast(linear: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (inputs[0].to(linear.weight.dtype),)

    return [
        linear.register_forward_pre_hook(cast)
        for name, linear in module.named_modules()
        if isinstance(linear, nn.Linear) and not name.startswith(inside)
    ]
