"""Blocks that are not run: what the model hands to them is seen, and answered, instead."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lrquant.blocks.residuals import in_line, stacked

Arguments = dict[str, Any]  # of a block's forward, beside the hidden states


class _Stub(nn.Module):
    """Stands in a block's place, answers for its attributes, and passes its inputs to `visit`."""

    def __init__(
        self,
        block: nn.Module,
        visit: Callable[[Tensor, Arguments], Tensor],
        in_tuple: bool,
        residuals: int,
    ) -> None:
        super().__init__()
        self.__dict__.update(block=block, visit=visit, in_tuple=in_tuple, residuals=residuals)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def forward(
        self, hidden_states: Tensor, *positional: object, **arguments: object
    ) -> Tensor | tuple[Tensor]:
        """Arguments that the model gives by position are passed on by their names."""
        residuals: int = self.__dict__["residuals"]
        names = list(inspect.signature(self.__dict__["block"].forward).parameters)[1:]
        named = dict(zip(names, positional, strict=False))
        output: Tensor = self.visit(in_line(hidden_states, residuals), named | arguments)
        output = stacked(output, residuals)
        return (output,) if self.__dict__["in_tuple"] else output


@contextmanager
def stubs(
    blocks: nn.ModuleList,
    visits: Sequence[Callable],
    in_tuples: bool = False,
    residuals: int = 1,
) -> Iterator[None]:
    """Blocks that are not run: each calls its visit with (hidden states, arguments) instead.

    The model gets what that returns, `in_tuples` where it takes the first of what a block returns.
    A visit sees and returns all of a block's `residuals` in line.
    """
    originals = list(blocks)
    try:
        for index, visit in enumerate(visits):
            blocks[index] = _Stub(originals[index], visit, in_tuples, residuals)
        yield
    finally:
        for index, block in enumerate(originals):
            blocks[index] = block
