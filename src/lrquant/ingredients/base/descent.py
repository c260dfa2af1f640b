"""Descent along the sign of the gradient, and a rate that falls to nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR


class SignDescent(torch.optim.Optimizer):
    """Every element moves by a rate, against its gradient's sign (SignSGD).

    The rate falls linearly from `rate` to 0 over so many `steps`, so that an element goes
    ``rate * (steps + 1) / 2`` at the farthest.  How many are taken is counted where the parameters
    are: a step is the same work each time.
    """

    def __init__(self, parameters: list[Tensor], rate: float, steps: int) -> None:
        super().__init__(parameters, {"lr": rate})
        self._left = torch.ones((), dtype=torch.float64, device=parameters[0].device)
        self._taken, self._steps = torch.zeros_like(self._left), steps

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every element that has a gradient."""
        for group in self.param_groups:
            rate = (group["lr"] * self._left).float()
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.addcmul_(parameter.grad.sign(), rate, value=-1)
        self._taken += 1
        self._left.copy_((1 - self._taken / self._steps).clamp(min=0))


def left(taken: int, steps: int) -> float:
    """What is left of a rate that falls linearly to 0 over so many steps, when some are taken."""
    return max(0.0, 1 - taken / steps)


def falling(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.Optimizer:
    """The same optimizer, whose rate falls linearly from what it is to 0 over so many steps."""
    schedule = LambdaLR(optimizer, lambda taken: left(taken, steps))

    def after(*_: Any) -> None:
        schedule.step()

    optimizer.register_step_post_hook(after)
    return optimizer
