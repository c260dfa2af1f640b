"""What of a model's blocks will be quantised, matrix by matrix, and what stays as it is."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from lrquant.blocks.plan import plan_block
from lrquant.config.schemes import Schemes
from lrquant.model.model import Model

_EXPERT = re.compile(r"\.\d+(?=\.)")


@dataclass(frozen=True)
class Contents:
    """Blocks that are made and quantised alike: their tensors by scheme, "" where none has one.

    A tensor is its name and its shape; of experts, all together, the name has a star.
    """

    blocks: tuple[int, ...]
    tensors: dict[str, list[tuple[str, tuple[int, ...]]]]


def contents(model: Model, schemes: Schemes) -> list[Contents]:
    """The kinds of blocks in order; small tensors, of one axis, apart."""
    kinds: dict[Hashable, Contents] = {}
    for index in range(len(model.blocks)):
        tensors = _tensors(model, index, schemes)
        key = tuple((scheme, tuple(own)) for scheme, own in tensors.items())
        before = kinds.get(key)
        blocks = (index,) if before is None else (*before.blocks, index)
        kinds[key] = Contents(blocks, tensors)
    return list(kinds.values())


def _tensors(
    model: Model, index: int, schemes: Schemes
) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    plan = plan_block(model, index, schemes)
    stored = model.blocks[index].state_dict()
    tensors: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, matrix in plan.matrices.items():
        scheme = plan.schemes[name]
        shape = tuple(matrix.of(stored[matrix.parameter]).shape)
        own = tensors.setdefault("" if scheme.floating_point else scheme.name, {})
        own[_EXPERT.sub(".*", name)] = shape
    held = {matrix.parameter for matrix in plan.matrices.values()}
    for name, tensor in stored.items():
        if tensor.dim() > 1 and name not in held:
            tensors.setdefault("", {})[name.removesuffix(".weight")] = tuple(tensor.shape)
    return {scheme: list(own.items()) for scheme, own in tensors.items()}


def spans(indices: Sequence[int]) -> str:
    """Block numbers for people: "0-2, 4-6, 9"."""
    words: list[str] = []
    start = before = indices[0]
    for index in (*indices[1:], None):
        if index is None or index != before + 1:
            words.append(str(start) if start == before else f"{start}-{before}")
            start = before if index is None else index
        before = before if index is None else index
    return ", ".join(words)
