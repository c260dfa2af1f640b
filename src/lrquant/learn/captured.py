"""Steps as CUDA graphs: what a step launches is kept, and launched again as one.

A step of a small block is over on a GPU before Python has said the next one.  All that differs from
one step of a block to the next is what its batches bring, and that is copied to where the kept
step reads it; parameters, the optimizers' state and the running means change in place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path, tree_leaves, tree_map

from lrquant.blocks.view import BlockView
from lrquant.blocks.workbench import Workbench
from lrquant.errors import LRQuantError
from lrquant.learn.block_data import Fed
from lrquant.team.team import Team

Step = Callable[[Sequence[Fed], int], Tensor]  # on what its batches bring, and its number
Replay = Callable[[], None]
Record = Callable[[Callable[[], Tensor]], tuple[Tensor, Replay]]
Kind = tuple[Hashable, ...]

TAKEN = 2  # of a kind, before one is recorded: they make state, compile, and choose kernels
MOST = 8  # kinds of a block; the others are never recorded
_PLAIN = (type(None), bool, int, float, str, torch.dtype)


class CapturedSteps:
    """The steps of a block: of each kind the first are taken as they are, one is recorded.

    Steps are of one kind whose batches are alike but for the values of their tensors.  Their
    numbers say no more of the steps of a lone process.
    """

    def __init__(self, step: Step, record: Record) -> None:
        self._step, self._record = step, record
        self._seen: Counter[Kind] = Counter()
        self._recorded: dict[Kind, _Recorded] = {}

    def __call__(self, feeds: Sequence[Fed], step: int) -> Tensor:
        kind = kind_of(feeds)
        if kind is None:
            return self._step(feeds, step)
        if kind not in self._recorded:
            self._seen[kind] += 1
            if self._seen[kind] <= TAKEN or len(self._recorded) == MOST:
                return self._step(feeds, step)
            self._recorded[kind] = _Recorded(feeds, step, self._step, self._record)
        return self._recorded[kind](feeds)


class _Recorded:
    """A step that reads what its batches bring from tensors of its own."""

    def __init__(self, feeds: Sequence[Fed], number: int, step: Step, record: Record) -> None:
        own = tree_map(_own, list(feeds))
        self._own, self._sources = _tensors(own), list[Tensor | None]()
        self._loss, self._replay = record(lambda: step(own, number))

    def __call__(self, feeds: Sequence[Fed]) -> Tensor:
        sources = _tensors(feeds)
        before = self._sources or [None] * len(sources)
        for own, source, last in zip(self._own, sources, before, strict=True):
            if source is not last:  # such as positions, which batches share
                own.copy_(source)
        self._sources = [*sources]
        self._replay()
        return self._loss.clone()


def kind_of(feeds: Sequence[Fed]) -> Kind | None:
    """What steps on such batches have in common; None where something of them is no value."""
    leaves, _ = tree_flatten_with_path(list(feeds))
    kind: list[Hashable] = []
    for path, leaf in leaves:
        if isinstance(leaf, Tensor):
            kind.append((path, leaf.shape, leaf.dtype, leaf.device))
        elif isinstance(leaf, _PLAIN):
            kind.append((path, type(leaf), leaf))
        else:
            return None
    return tuple(kind)


def recorder(bench: Workbench, views: Sequence[BlockView], team: Team) -> Record | None:
    """What records the steps of blocks that are learned together; None where they are not to be.

    Tokens go to experts by their values, and several processes wait for each other in a step.
    """
    experts = any(each.expert is not None for view in views for each in view.matrices.values())
    return None if experts or team.size > 1 or not bench.captured else cuda_graphs()


def cuda_graphs() -> Record:
    """What records a step as a CUDA graph; all that it records have their memory in common."""
    pool = torch.cuda.graph_pool_handle()

    def record(step: Callable[[], Tensor]) -> tuple[Tensor, Replay]:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool):
                loss = step()
        except RuntimeError as error:
            raise LRQuantError(
                f"--cuda-graphs: a step of this model can't be recorded ({error}); leave it out"
            ) from error
        return loss, graph.replay

    return record


def _own(leaf: object) -> object:
    return torch.empty_like(leaf) if isinstance(leaf, Tensor) else leaf


def _tensors(feeds: Sequence[Fed]) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(list(feeds)) if isinstance(leaf, Tensor)]
