"""The block loss: its terms summed over branches, and the weights of the terms.

With D = MSE + NLC, LRQuant (ACL 2024) learns ``D(Fq(X_q), F(X_fp))``; LRQuant+ (TPAMI 2025) adds
the homologous branch ``D(Fq(X_q), F(X_q))`` and weighs the sum of the squared errors L1 and that of
the cosine terms L2 by their running means: ``L1 / (e1 + 1e-6) + L2 / (e2 + 1e-6)``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lrquant.numerics.compiled import call_compiled
from lrquant.numerics.losses import Term, terms_of

MEAN_DECAY = 0.95
SMALLEST_MEAN = 1e-6


def loss_terms(
    output: Tensor,
    targets: Sequence[Tensor],
    kind: str,
    weights: Tensor | None = None,
    *,
    compiled: bool = False,
) -> Tensor:
    """Each term of `kind` ("mse+nlc", "mse", "nlc"), summed over the branches' targets.

    Block outputs (batch, tokens, hidden), each token counting as its weight (batch, tokens) says
    -> (terms,) float32.  Where they are `compiled`, sums differ in the last bits.  A CPU, which
    takes twice as long then, and terms that do not compile are left as they are.
    """
    losses = terms_of(kind)
    terms = tuple(loss.function for loss in losses)
    if compiled and output.device.type != "cpu" and all(loss.compiles for loss in losses):
        return CompiledTerms.apply(output, terms, weights, *targets)
    return _terms(output, targets, terms, weights)


def _terms(
    output: Tensor, targets: Sequence[Tensor], terms: Sequence[Term], weights: Tensor | None
) -> Tensor:
    return torch.stack(
        [torch.stack([term(output, target, weights) for target in targets]).sum() for term in terms]
    )


def _gradient(
    output: Tensor,
    targets: Sequence[Tensor],
    terms: Sequence[Term],
    weights: Tensor | None,
    to_terms: Tensor,
) -> Tensor:
    """The gradient to the output, from that to the terms."""
    backward = torch.func.vjp(lambda states: _terms(states, targets, terms, weights), output)[1]
    (gradient,) = backward(to_terms)
    return gradient


class CompiledTerms(torch.autograd.Function):
    """The terms, and their gradient computed anew: nothing is kept but what they are made of."""

    @staticmethod
    def forward(
        ctx, output: Tensor, terms: tuple[Term, ...], weights: Tensor | None, *targets: Tensor
    ) -> Tensor:
        ctx.save_for_backward(output, weights, *targets)
        ctx.terms = terms
        return call_compiled(_terms, output, targets, terms, weights, by_size=False)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        output, weights, *targets = ctx.saved_tensors
        own = output, tuple(targets), ctx.terms, weights, gradient
        to_output = call_compiled(_gradient, *own, by_size=False)
        return to_output, None, None, *(None for _ in targets)


class Objective:
    """How the terms (terms,) of one block become one number; made anew for every block.

    `loss` is what a step descends, once `see` was told of it.  `measure` has fixed weights, so that
    its values at different steps compare: 1 without dynamic weights, else the inverse of the terms
    before learning.
    `ema_init` starts the running means at the first loss ("first") or at 1 as published ("one").
    """

    def __init__(self, initial: Tensor, dynamic: bool, ema_init: str) -> None:
        self._dynamic = dynamic
        self._means = torch.ones_like(initial) if ema_init == "one" else None
        ones = torch.ones_like(initial)
        self._fixed = 1 / (initial + SMALLEST_MEAN) if dynamic else ones

    @property
    def weights(self) -> Tensor:
        """The fixed weights (terms,)."""
        return self._fixed

    def see(self, terms: Tensor) -> None:
        """Move the running means by a step's terms, before what these weigh is descended."""
        if self._dynamic:
            before = terms if self._means is None else self._means
            means = MEAN_DECAY * before + (1 - MEAN_DECAY) * terms
            self._means = means if self._means is None else self._means.copy_(means)

    def loss(self, terms: Tensor) -> Tensor:
        """Weighted sum of the terms of a step, or of a part of it, a float32 scalar."""
        if self._means is None or not self._dynamic:
            return terms.sum()
        return (terms / (self._means + SMALLEST_MEAN)).sum()

    def measured(self, terms: Tensor) -> Tensor:
        """Sum of terms under the fixed weights, a float32 scalar where the terms are."""
        return (terms.detach() * self._fixed).sum()

    def measure(self, terms: Tensor) -> float:
        """The same as a number: waits for the device."""
        return float(self.measured(terms))
