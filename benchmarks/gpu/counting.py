"""Operations of torch as they are dispatched: bytes, launches and waits, by the part of a step."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import FrameType
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lrquant.learn import objective
from lrquant.numerics import tokens, weights

PRODUCTS, ATTENTION, LOSSES = "products", "attention", "losses"
WEIGHTS, ACTIVATIONS, REST, STEPPING = "weight quantizer", "activations", "rest", "optimizer"
_BY_FILE = {
    "numerics/weights.py": WEIGHTS,
    "numerics/tokens.py": ACTIVATIONS,
    "learn/objective.py": LOSSES,
}
_MULTIPLYING = {"mm", "addmm", "bmm", "baddbmm", "mv"}
_VIEWS = {
    *(
        "view",
        "_unsafe_view",
        "expand",
        "transpose",
        "t",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
    ),
    *("detach", "alias", "as_strided", "split", "split_with_sizes", "permute", "unbind"),
    *("_reshape_alias", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
}
_ONLY_WRITING = {
    *("zero_", "fill_", "zeros", "ones", "full", "zeros_like", "ones_like", "full_like"),
    *("new_zeros", "new_full", "arange", "scalar_tensor", "copy_"),
}
_WAITING = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero"}
_FLASH_BACKWARD = 3  # launches: rows of the gradient's product, the products, the queries' cast


@dataclass
class Count:
    """Kernels launched, bytes moved and floating-point operations of one part."""

    launches: int = 0
    bytes: int = 0
    operations: int = 0

    def add(self, other: Count) -> None:
        """Take another part's in."""
        self.launches += other.launches
        self.bytes += other.bytes
        self.operations += other.operations


class Counter(TorchDispatchMode):
    """Counts of what is dispatched on one device, by (part, "forward" or "backward").

    `waits` are what a device would be waited for: values that are read, data that is copied to it.
    A compiled function counts as what it reads and writes once, in one launch: the least it can be.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.counts: dict[tuple[str, str], Count] = defaultdict(Count)
        self.waits = 0
        self._at_losses = True  # in the backward pass, until its first product
        self._inside: tuple[str, str] | None = None  # of a compiled function

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        read = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if name == "_local_scalar_dense":
            self._wait(read)
            return 1.0
        result = function(*args, **(kwargs or {}))
        written = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        if name in _WAITING or _crosses(read, written):
            self._wait([*read, *written])
        on_device = any(each.device == self.device for each in (*read, *written))
        if on_device and name not in _VIEWS and self._inside is None:
            self._add(name, read, written)
        return result

    def _wait(self, tensors: list[Tensor]) -> None:
        self.waits += any(each.device == self.device for each in tensors)

    def _add(self, name: str, read: list[Tensor], written: list[Tensor]) -> None:
        backward, part = _place(name)
        if backward and part in (PRODUCTS, ATTENTION, WEIGHTS, ACTIVATIONS):
            self._at_losses = False
        if backward and part == REST and self._at_losses:
            part = LOSSES
        moved = sum(map(_size, written))
        if name not in _ONLY_WRITING:
            moved += sum(map(_size, read))
        elif name == "copy_":
            moved += _size(read[1])
        launches = _FLASH_BACKWARD if "flash" in name and "backward" in name else 1
        direction = "backward" if backward else "forward"
        self.counts[part, direction].add(Count(launches, moved, _operations(name, read)))

    def whole(self, function: Callable[..., object], *arguments: object, **kinds: object) -> object:
        """A compiled function: its inputs and outputs once."""
        backward, part = _place("")
        place = part, "backward" if backward else "forward"
        self._at_losses &= not backward
        self._inside = place
        try:
            result = function(*arguments)
        finally:
            self._inside = None
        leaves = [*_tensors(arguments), *_tensors(result)]
        self.counts[place].add(Count(1, sum(map(_size, leaves))))
        return result

    def made(self, make: Callable[..., Tensor], values: object, **kinds: object) -> Tensor:
        """A tensor of Python's numbers, which is copied to where it is to be."""
        result = make(values, **kinds)
        self._wait([result])
        return result

    @property
    def total(self) -> Count:
        """All parts together."""
        total = Count()
        for each in self.counts.values():
            total.add(each)
        return total


@contextmanager
def counting(device: torch.device) -> Iterator[Counter]:
    """Count what is dispatched meanwhile; attention is flash attention's, as on CUDA."""
    counter = Counter(device)
    with (
        mock.patch.object(functional, "scaled_dot_product_attention", flash),
        mock.patch.object(torch, "tensor", partial(counter.made, torch.tensor)),
        mock.patch.object(weights, "call_compiled", counter.whole),
        mock.patch.object(tokens, "call_compiled", counter.whole),
        mock.patch.object(objective, "call_compiled", counter.whole),
        counter,
    ):
        yield counter


def flash(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, **_: object
) -> Tensor:
    """Flash attention in place of torch's choice of a kernel."""
    return torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, is_causal=is_causal
    )[0]


def _place(name: str) -> tuple[bool, str]:
    """Whether an operation is of the backward pass, and the part that it is of, by who calls."""
    part, frame = REST, sys._getframe(2)
    if name in _MULTIPLYING:
        part = PRODUCTS
    elif "flash" in name:
        part = ATTENTION
    for each in _callers(frame):
        path, inside = each.f_code.co_filename, each.f_code.co_name
        if inside == "_engine_run_backward":
            return True, part
        if part == REST:
            part = next((own for end, own in _BY_FILE.items() if path.endswith(end)), part)
    return False, part


def _callers(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _crosses(read: list[Tensor], written: list[Tensor]) -> bool:
    """Whether data goes from one device to another."""
    kinds = {each.device.type for each in (*read, *written) if each.dim()}
    return len(kinds) > 1


def _tensors(values: object) -> list[Tensor]:
    """All tensors in nested tuples, dicts and dataclasses."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = tuple(values.values())
    elif hasattr(values, "__dataclass_fields__"):
        values = tuple(vars(values).values())
    if isinstance(values, list | tuple):
        return [each for value in values for each in _tensors(value)]
    return []


def _size(tensor: Tensor) -> int:
    """Bytes of memory behind a tensor: what is expanded is read once."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * torch.Size(n for n, stride in pairs if stride).numel()


def _operations(name: str, read: list[Tensor]) -> int:
    if name in ("mm", "bmm", "mv"):
        left, right = read[:2]
        columns = right.shape[-1] if right.dim() > 1 else 1
        return 2 * left.numel() * columns
    if name == "addmm":
        return 2 * read[1].numel() * read[2].shape[-1]
    if "flash" in name:
        query, key = read[1:3] if "backward" in name else read[:2]
        pairs = query.numel() * key.shape[2] // 2  # causal
        return (10 if "backward" in name else 4) * pairs
    return 0
