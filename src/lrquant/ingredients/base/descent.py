"""Descent along the sign of the gradient, at a rate that falls to nothing."""

from __future__ import annotations

import torch
from torch import Tensor


class SignDescent(torch.optim.Optimizer):
    """Every element moves by the rate, against its gradient's sign (SignSGD).

    The rate falls linearly from `rate` to 0 over `steps`, as of AutoRound (Cheng et al., 2023): the
    farthest that an element can go is ``rate * (steps + 1) / 2``.
    """

    def __init__(self, parameters: list[Tensor], rate: float, steps: int) -> None:
        super().__init__(parameters, {"lr": rate})
        self._steps, self._taken = steps, 0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every element that has a gradient."""
        left = max(0.0, 1 - self._taken / self._steps)
        self._taken += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad.sign(), alpha=group["lr"] * left)
