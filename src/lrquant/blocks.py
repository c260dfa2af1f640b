"""Running a model block by block: the first block's inputs, one block's forward, the head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PretrainedConfig

from lrquant.attention import attention_name
from lrquant.errors import LRQuantError
from lrquant.model import Model
from lrquant.numerics.affine import fake_quantize_tokens
from lrquant.scheme import FLOAT_BITS, Scheme
from lrquant.streams import Stream

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

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        return self.visit(hidden_states, arguments)


@contextmanager
def _stubs(blocks: nn.ModuleList, visits: Sequence[Callable]) -> Iterator[None]:
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


class BlockInputs:
    """What the model hands to its blocks: the first hidden states and every block's arguments.

    Arguments are kept per batch and per block, and shared by batches for which they are equal.
    """

    def __init__(self, model: Model, ids: Tensor, batch_size: int, device: torch.device) -> None:
        positions = getattr(model.skeleton.config, "max_position_embeddings", None)
        if positions is not None and ids.shape[1] > positions:
            raise LRQuantError(
                f"samples of {ids.shape[1]} tokens: the model has {positions} positions; "
                f"use --seqlen {positions} or less"
            )
        self.batches = [
            slice(start, min(start + batch_size, len(ids)))
            for start in range(0, len(ids), batch_size)
        ]
        self.shape = (*ids.shape, model.skeleton.config.hidden_size)
        self._arguments: list[list[dict[str, Any]]] = []
        self._model, self._ids, self._device = model, ids, device

    def embed(self, stream: Stream) -> None:
        """Fill `stream` with the first block's inputs and record the arguments of all blocks."""
        base = self._model.skeleton.base_model
        tensors = self._model.outer_tensors(torch.device("cpu"), torch.float32, head=False)
        self._arguments = []
        for samples in self.batches:
            seen: list[tuple[Tensor, dict[str, Any]]] = []

            def visit(hidden: Tensor, arguments: dict[str, Any], seen=seen) -> Tensor:
                seen.append((hidden, arguments))
                if len(seen) == len(self._model.blocks):
                    raise _Recorded
                return hidden

            with (
                torch.no_grad(),
                _stubs(self._model.blocks, [visit] * len(self._model.blocks)),
            ):
                try:
                    inputs = {"input_ids": self._ids[samples], "use_cache": False}
                    functional_call(base, tensors, (), inputs, tie_weights=False)
                except _Recorded:
                    pass
            stream.write(samples, seen[0][0])
            self._keep([_to_device(arguments, self._device) for _, arguments in seen])

    def _keep(self, arguments: list[dict[str, Any]]) -> None:
        if self._arguments and _equal(self._arguments[-1], arguments):
            arguments = self._arguments[-1]
        self._arguments.append(arguments)

    def arguments(self, batch: int, block: int) -> dict[str, Any]:
        """Keyword arguments of one block for one batch."""
        return self._arguments[batch][block]


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
        config: PretrainedConfig,
        linears: Sequence[str],
        scheme: Scheme,
        dtype: torch.dtype,
        shifted: Sequence[str] = (),
        observer: Observer | None = None,
    ) -> None:
        self.block, self.config, self.linears, self.shifted = block, config, linears, shifted
        self.scheme, self.dtype, self.observer = scheme, dtype, observer
        self._handles: list[Any] = []
        self._last: tuple[Tensor, Tensor] | None = None
        self._tokens = torch.Size((0, 0))
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
        """Block output (batch, tokens, hidden), float32, with `tensors` in place of parameters."""
        self._tokens = hidden_states.shape[:2]
        output = functional_call(self.block, self.bind(tensors), (hidden_states,), arguments)
        return output[0] if isinstance(output, tuple) else output

    def bind(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Keep what the hooks apply among `tensors`; the rest are the block's parameters."""
        suffixes = SHIFT_SUFFIX, INPUT_FACTOR_SUFFIX
        self._extras = {name: t for name, t in tensors.items() if name.endswith(suffixes)}
        return {name: t for name, t in tensors.items() if name not in self._extras}

    def on(self, block: nn.Module, config: PretrainedConfig) -> BlockRunner:
        """The same hooks for another block of the same shape."""
        return BlockRunner(block, config, self.linears, self.scheme, self.dtype, self.shifted)

    def _before(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        (values,) = inputs
        if self.observer is not None:
            flattened = values.dim() == 2 and len(values) == self._tokens.numel()
            self.observer(name, values.unflatten(0, self._tokens) if flattened else values)
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


class Head:
    """Everything after the last block: final norm and language head, on hidden states."""

    def __init__(self, model: Model, device: torch.device, dtype: torch.dtype) -> None:
        self._model, self._device = model, device
        self._tensors = model.outer_tensors(device, dtype, head=True)

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """Logits (batch, tokens, vocabulary) of final hidden states (batch, tokens, hidden)."""
        model = self._model
        visits = [lambda hidden, arguments: hidden_states] * len(model.blocks)
        ids = torch.zeros(hidden_states.shape[:2], dtype=torch.long, device=self._device)
        handles = cast_outer_linears(model.skeleton, model.architecture.blocks)
        try:
            with torch.no_grad(), _stubs(model.blocks, visits):
                inputs = {"input_ids": ids, "use_cache": False}
                return functional_call(
                    model.skeleton, self._tensors, (), inputs, tie_weights=False
                ).logits
        finally:
            for handle in handles:
                handle.remove()


def cast_outer_linears(module: nn.Module, blocks: str) -> list[Any]:
    """Hook every linear outside `blocks` to cast its input to its weight's dtype."""

    def cast(linear: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (inputs[0].to(linear.weight.dtype),)

    return [
        linear.register_forward_pre_hook(cast)
        for name, linear in module.named_modules()
        if isinstance(linear, nn.Linear) and not name.startswith(blocks + ".")
    ]
