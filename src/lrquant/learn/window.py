"""A window: consecutive blocks that are learned together, by the error at the end of the last.

It is to learning what a block's view and runner are: parameters and tensors of all of its blocks,
under names that begin with the block's index and a dot.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lrquant.blocks.runner import BlockRunner, Observer
from lrquant.blocks.stubs import Arguments
from lrquant.blocks.view import BlockView


class Step(NamedTuple):
    """A block's arguments, and what the model adds to the hidden states before it."""

    arguments: Arguments
    added: Tensor | None


class Window:
    """Blocks from `first` on, each with its view and its runner; a context manager of the hooks."""

    def __init__(
        self, first: int, views: Sequence[BlockView], runners: Sequence[BlockRunner]
    ) -> None:
        self.first, self.views, self.runners = first, tuple(views), tuple(runners)
        self._hooks = ExitStack()
        self._observer: Observer | None = None

    def __enter__(self) -> Window:
        for runner in self.runners:
            self._hooks.enter_context(runner)
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.close()

    def __call__(
        self, tensors: dict[str, Tensor], hidden_states: Tensor, steps: Sequence[Step]
    ) -> Tensor:
        """Output (batch, tokens, hidden) of the last block, with `tensors` for parameters.

        Between blocks states have the dtype of streams, as they have where blocks run one by one.
        """
        for index, (runner, step) in enumerate(zip(self.runners, steps, strict=True), self.first):
            own = _of(tensors, index)
            states = hidden_states if index == self.first else hidden_states.to(self.dtype).float()
            states = states if step.added is None else states + step.added
            hidden_states = runner(own, states, step.arguments)
        return hidden_states

    @property
    def compiled(self) -> bool:
        """Whether what can be is compiled."""
        return self.runners[0].compiled

    @property
    def observer(self) -> Observer | None:
        """Who is told of the inputs of all blocks, by names that begin with the block's index."""
        return self._observer

    @observer.setter
    def observer(self, observer: Observer | None) -> None:
        self._observer = observer
        for index, runner in enumerate(self.runners, self.first):
            runner.observer = None if observer is None else partial(_tell, observer, index)

    @property
    def dtype(self) -> torch.dtype:
        """That of products."""
        return self.views[0].dtype

    @property
    def parameters(self) -> dict[str, Tensor]:
        """What is learned of all blocks."""
        return self._joined([view.parameters for view in self.views])

    @parameters.setter
    def parameters(self, parameters: dict[str, Tensor]) -> None:
        for index, view in enumerate(self.views, self.first):
            view.parameters = _of(parameters, index)

    @property
    def moving(self) -> dict[str, Tensor]:
        """What learning changes of all blocks."""
        return self._joined([view.moving for view in self.views])

    @property
    def by_expert(self) -> bool:
        """Whether experts' weights of some block are made one by one."""
        return any(view.by_expert for view in self.views)

    @property
    def stored(self) -> dict[str, Tensor]:
        """The blocks' own tensors."""
        return self._joined([view.stored for view in self.views])

    def tensors(self) -> dict[str, Tensor]:
        """What the blocks compute with, differentiable in the parameters."""
        return self._joined([view.tensors() for view in self.views])

    def frozen_tensors(self) -> dict[str, Tensor]:
        """The same out of codes and scales."""
        return self._joined([view.frozen_tensors() for view in self.views])

    def constrain_(self) -> None:
        """Bring the parameters back to where they may be, after a step."""
        for view in self.views:
            view.constrain_()

    def harden_(self) -> None:
        """End learning: see BlockView."""
        for view in self.views:
            view.harden_()

    def _joined(self, blocks: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {
            f"{index}.{name}": tensor
            for index, block in enumerate(blocks, self.first)
            for name, tensor in block.items()
        }


def _tell(observer: Observer, index: int, name: str, values: Tensor) -> None:
    observer(f"{index}.{name}", values)


def _of(tensors: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    start = f"{index}."
    return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
