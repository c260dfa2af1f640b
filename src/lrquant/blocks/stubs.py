"""Blocks that are not run: what the model hands to them is seen, and answered, instead."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Arguments = dict[str, Any]  # of a block's forward, beside the hidden states


class _Stub(nn.Module):
    """Stands in a block's place, answers for its attributes, and passes its inputs to `visit`."""

    def __init__(self, block: nn.Module, visit: Callable[[Tensor, Arguments], Tensor]) -> None:
        super().__init__()
        self.__dict__.update(block=block, visit=visit)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def forward(self, hidden_states: Tensor, *positional: object, **arguments: object) -> Tensor:
        """Arguments that the model gives by position are passed on by their names."""
        names = list(inspect.signature(self.__dict__["block"].forward).parameters)[1:]
        named = dict(zip(names, positional, strict=False))
        return self.visit(hidden_states, named | arguments)


@contextmanager
def stubs(blocks: nn.ModuleList, visits: Sequence[Callable]) -> Iterator[None]:
    """Blocks that are not run: each calls its visit with (hidden states, arguments) instead."""
    originals = list(blocks)
    try:
        for index, visit in enumerate(visits):
            blocks[index] = _Stub(originals[index], visit)
        yield
    finally:
        for index, block in enumerate(originals):
            blocks[index] = block
