"""What blocks leave for later ones beside hidden states: keys and values that these read too."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

States = Mapping[str, tuple[Tensor, ...]]


class HandedOn(dict[str, tuple[Tensor, ...]]):
    """The states of one batch, which a block reads and may set; a mapping that models take."""

    def __init__(self, kept: States) -> None:
        super().__init__(kept)
        self._kept = dict(kept)

    @property
    def new(self) -> States:
        """What has been set since."""
        return {name: states for name, states in self.items() if self._kept.get(name) is not states}


def moved(states: States, device: torch.device, dtype: torch.dtype | None = None) -> States:
    """The same without a history, on a device, in a dtype or in their own."""
    return {
        name: tuple(each.detach().to(device, dtype or each.dtype) for each in tensors)
        for name, tensors in states.items()
    }


def leaves(states: States) -> HandedOn:
    """The same for a block whose gradient to them is asked for."""
    return HandedOn(
        {
            name: tuple(each.detach().requires_grad_(True) for each in tensors)
            for name, tensors in states.items()
        }
    )


def owe_(owed: dict[str, list[Tensor]], read: HandedOn) -> None:
    """Add the gradients to `leaves` to those that later blocks owe the one that left them."""
    for name in read.keys() - read.new.keys():
        gradients = [each.grad for each in read[name] if each.grad is not None]
        if gradients:
            before = owed.get(name) or [torch.zeros_like(each) for each in gradients]
            owed[name] = [total + own for total, own in zip(before, gradients, strict=True)]
