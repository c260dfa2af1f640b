"""Allocated bytes of tensors without values, on the host and on a device that computes nothing."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from gpu.counting import flash

BACKEND = "pretended"


def pretended() -> torch.device:
    """The device that computes nothing; once in a process."""
    _setup_privateuseone_for_python_backend(BACKEND)
    return torch.device(BACKEND, 0)


class Allocations(TorchDispatchMode):
    """Bytes that are alive by kind of device, and the most that there were (`most`).

    What is read of tensors without values is 1, and two of them are equal.
    """

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.now: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self._fake, self._alive = fake, set[int]()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            return 1.0
        if function is torch.ops.aten.equal.default:
            return True
        args, kwargs = tree_map_only(Tensor, self._without_values, (args, kwargs or {}))
        result = function(*args, **kwargs)
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                self._add(each.device.type, each.untyped_storage())
        return result

    def _without_values(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self._fake.from_tensor(tensor)

    def _add(self, kind: str, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self.now[kind] += size
        self.most[kind] = max(self.most[kind], self.now[kind])
        weakref.finalize(storage, self._drop, kind, key, size)

    def _drop(self, kind: str, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now[kind] -= size


@contextmanager
def without_values() -> Iterator[Allocations]:
    """Count within; attention is flash attention."""
    with (
        mock.patch.object(functional, "scaled_dot_product_attention", flash),
        mock.patch.object(torch, "tensor", _made_on_the_host(torch.tensor)),
        FakeTensorMode(allow_non_fake_inputs=True) as fake,
        Allocations(fake) as allocations,
    ):
        yield allocations


def _made_on_the_host(made: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.tensor, which does not go through the modes, for a device that has no memory."""

    def tensor(data: object, *, device: torch.device | None = None, **rest: Any) -> Tensor:
        return made(data, **rest).to(device) if device is not None else made(data, **rest)

    return tensor
