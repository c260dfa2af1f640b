"""A module of experts: how it holds their weights, and how it is given their tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

from torch import Tensor, nn

SECOND = "down_proj"
_GATED, _UNGATED = "gate_up_proj", "up_proj"


@dataclass(frozen=True)
class ExpertForm:
    """`first` names the parameter of all experts' first matrices; the second's is `SECOND`.

    `activation` stands between the two; `biased` says that both have biases, `transposed` that
    inputs come first in the store.  `in_rows`: the module gets a row of every token for each of the
    experts, (experts * tokens, hidden), 0 where the token does not go to it, and gives as many;
    else it gets the tokens and each one's experts, through transformers' interface.
    """

    first: str
    activation: Callable[[Tensor], Tensor]
    biased: bool = False
    transposed: bool = False
    in_rows: bool = False


def expert_form(module: nn.Module) -> ExpertForm | None:
    """The form of a module of experts; None for another module."""
    if hasattr(module, "has_gate"):
        first, between = (_GATED, "_apply_gate") if module.has_gate else (_UNGATED, "act_fn")
        activation = getattr(module, between)
        return ExpertForm(first, activation, bool(module.has_bias), bool(module.is_transposed))
    if not _takes_rows(module):
        return None
    first, second = getattr(module, _GATED), getattr(module, SECOND)
    activation = partial(_gated, getattr(module, "act_fn"))  # noqa: B009
    transposed = first.shape[2] == 2 * second.shape[1]
    return ExpertForm(_GATED, activation, transposed=transposed, in_rows=True)


def _takes_rows(module: nn.Module) -> bool:
    """Whether it holds experts and is called with one tensor, which says of none where it goes."""
    own = dict(module.named_parameters(recurse=False))
    stacked = own.keys() == {_GATED, SECOND} and all(each.dim() == 3 for each in own.values())
    return stacked and _takes_one(type(module).forward)


@cache
def _takes_one(forward: Callable[..., object]) -> bool:
    """Whether a class's `forward` takes one argument."""
    return len(inspect.signature(forward).parameters) == 2  # with self


def _gated(act: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    gate, up = values.chunk(2, dim=-1)
    return act(gate) * up
