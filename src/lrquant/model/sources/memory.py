"""Weights that are tensors already: of a module in memory, or of a file that is mapped."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from lrquant.errors import LRQuantError
from lrquant.model.device import dtype_name
from lrquant.model.sources.protocol import WeightSource


class HeldTensors(WeightSource):
    """Tensors by name, whose shapes and dtypes are known without reading them."""

    _tensors: dict[str, Tensor]

    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> str:
        return dtype_name(self._tensors[name].dtype)


class ModuleSource(HeldTensors):
    """The state dict of a module in memory."""

    def __init__(self, module: nn.Module) -> None:
        self.origin = f"{type(module).__name__} in memory"
        self._tensors = {
            name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)
        }
        empty = [name for name, tensor in self._tensors.items() if tensor.is_meta]
        if empty:
            raise LRQuantError(
                f"{self.origin}: {len(empty)} tensors (first: {empty[0]}) hold no values, they are "
                "on the meta device; load the weights first"
            )

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name].detach().cpu()

    def fingerprint(self) -> str:
        """SHA-256 over name, dtype, shape and bytes of every tensor."""
        digest = hashlib.sha256()
        for name in sorted(self._tensors):
            tensor = self.tensor(name).contiguous()
            digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\n".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()
