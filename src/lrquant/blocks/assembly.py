"""Stored parameters put together from their matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from lrquant.architectures.matrix import Matrix
from lrquant.blocks.experts import Apart

MOST_TOGETHER = 1 << 24  # weights that go through a grid at once: a few float32 copies of them do


def assembled(matrices: Mapping[str, Matrix], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters by name of the values (out, in) of their matrices, which cover them."""
    return _joined({name: matrices[name] for name in values}, values, "parameter")


def assembled_biases(
    matrices: Mapping[str, Matrix], values: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Biases by name of the values (out,) of their matrices."""
    return _joined({name: matrices[name] for name in values}, values, "bias")


def batches_of_experts(
    matrices: Mapping[str, Matrix], stored: Mapping[str, Tensor]
) -> dict[str, list[list[Matrix]]]:
    """Matrices of experts by parameter, where they lie one below the other, in their order there.

    Some experts together, all of each, of at most `MOST_TOGETHER` weights if more than one.
    """
    batches: dict[str, list[list[Matrix]]] = {}
    for parameter, experts in _by_expert(matrices).items():
        if any(matrix.transposed for own in experts.values() for matrix in own):
            continue
        together = max(1, MOST_TOGETHER // stored[parameter][0].numel())
        numbers = sorted(experts)
        batches[parameter] = [
            [m for n in numbers[start : start + together] for m in _in_order(experts[n])]
            for start in range(0, len(numbers), together)
        ]
    return batches


def _by_expert(matrices: Mapping[str, Matrix]) -> dict[str, dict[int, list[Matrix]]]:
    parts: dict[str, dict[int, list[Matrix]]] = {}
    for matrix in matrices.values():
        if matrix.expert is not None:
            parts.setdefault(matrix.parameter, {}).setdefault(matrix.expert, []).append(matrix)
    return parts


def _in_order(matrices: list[Matrix]) -> list[Matrix]:
    return sorted(matrices, key=lambda matrix: matrix.rows or (0, 0))


def made_by_expert(
    matrices: Mapping[str, Matrix], value: Callable[[str], Tensor]
) -> dict[str, Apart]:
    """Parameters of experts by name, each expert's part made of `value` (out, in) of a matrix."""

    def make(own: dict[int, list[Matrix]], expert: int) -> Tensor:
        return _of_expert([(matrix, value(matrix.name)) for matrix in own[expert]])

    return {name: Apart(len(own), partial(make, own)) for name, own in _by_expert(matrices).items()}


def _joined(
    matrices: Mapping[str, Matrix], values: Mapping[str, Tensor], attribute: str
) -> dict[str, Tensor]:
    parameters: dict[str, list[str]] = {}
    for name, matrix in matrices.items():
        parameters.setdefault(getattr(matrix, attribute), []).append(name)
    return {
        parameter: _of_slices(parameter, [(matrices[name], values[name]) for name in names])
        for parameter, names in parameters.items()
    }


def _of_slices(parameter: str, slices: list[tuple[Matrix, Tensor]]) -> Tensor:
    by_expert: dict[int | None, list[tuple[Matrix, Tensor]]] = {}
    for matrix, value in slices:
        by_expert.setdefault(matrix.expert, []).append((matrix, value))
    experts = []
    for expert in sorted(by_expert, key=lambda index: index or 0):
        experts.append(_of_expert(by_expert[expert]))
    return experts[0] if list(by_expert) == [None] else torch.stack(experts)


def _of_expert(slices: list[tuple[Matrix, Tensor]]) -> Tensor:
    rows = sorted(slices, key=lambda each: each[0].rows or (0, 0))
    value = rows[0][1] if len(rows) == 1 else torch.cat([value for _, value in rows])
    return value.t() if rows[0][0].transposed and value.dim() == 2 else value
