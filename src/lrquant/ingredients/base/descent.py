"""Descent along the sign of the gradient, and a rate that falls to nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR


class SignDescent(torch.optim.Optimizer):
    """Every element moves by the rate, against its gradient's sign (SignSGD)."""

    def __init__(self, parameters: list[Tensor], rate: float) -> None:
        super().__init__(parameters, {"lr": rate})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every element that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad.sign(), alpha=group["lr"])


def left(taken: int, steps: int) -> float:
    """What is left of a rate that falls linearly to 0 over so many steps, when some are taken."""
    return max(0.0, 1 - taken / steps)


def falling(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.Optimizer:
    """The same optimizer, whose rate falls linearly from what it is to 0 over so many steps.

    By sign descent an element goes ``rate * (steps + 1) / 2`` at the farthest.
    """
    schedule = LambdaLR(optimizer, lambda taken: left(taken, steps))

    def after(*_: Any) -> None:
        schedule.step()

    optimizer.register_step_post_hook(after)
    return optimizer
