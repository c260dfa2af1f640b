"""Allocated bytes by kind of device, also of tensors without values."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
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


def pretended() -> None:
    """Let there be the device that computes nothing; once in a process."""
    _setup_privateuseone_for_python_backend(BACKEND)


class Allocations(TorchDispatchMode):
    """Bytes that are alive by kind of device, and the most that there were (`most`).

    Those of `others`, which there were before, do not count.
    """

    def __init__(self, others: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self._others = [each.untyped_storage() for each in others]
        self._alive = {storage._cdata for storage in self._others}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                self._add(each.device.type, each.untyped_storage())
        return result

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


class _WithoutValues(Allocations):
    """The same where no tensor has values: what is read of them is 1, and two of them are equal."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self._fake = fake

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            return 1.0
        if function is torch.ops.aten.equal.default:
            return True
        args, kwargs = tree_map_only(Tensor, self._emptied, (args, kwargs or {}))
        return super().__torch_dispatch__(function, types, args, kwargs)

    def _emptied(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self._fake.from_tensor(tensor)


@contextmanager
def without_values() -> Iterator[Allocations]:
    """Count within; attention is flash attention."""
    with (
        mock.patch.object(functional, "scaled_dot_product_attention", flash),
        mock.patch.object(torch, "tensor", _made_on_the_host(torch.tensor)),
        FakeTensorMode(allow_non_fake_inputs=True) as fake,
        _WithoutValues(fake) as allocations,
    ):
        yield allocations


def _made_on_the_host(made: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.tensor, which does not go through the modes, for a device that has no memory."""

    def tensor(data: object, *, device: torch.device | None = None, **rest: Any) -> Tensor:
        return made(data, **rest).to(device) if device is not None else made(data, **rest)

    return tensor
