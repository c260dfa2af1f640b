"""Stored parameters put together from their matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from lrquant.architectures.matrix import Matrix
from lrquant.blocks.experts import Apart


def assembled(matrices: Mapping[str, Matrix], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters by name of the values (out, in) of their matrices, which cover them."""
    return _joined({name: matrices[name] for name in values}, values, "parameter")


def assembled_biases(
    matrices: Mapping[str, Matrix], values: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Biases by name of the values (out,) of their matrices."""
    return _joined({name: matrices[name] for name in values}, values, "bias")


def by_expert(matrices: Mapping[str, Matrix]) -> dict[str, dict[int, list[Matrix]]]:
    """Those of the matrices that are experts', by parameter and by the expert's number."""
    parts: dict[str, dict[int, list[Matrix]]] = {}
    for matrix in matrices.values():
        if matrix.expert is not None:
            parts.setdefault(matrix.parameter, {}).setdefault(matrix.expert, []).append(matrix)
    return parts


def in_order(matrices: list[Matrix]) -> list[Matrix]:
    """Matrices of a parameter, or of an expert in one, by their rows."""
    return sorted(matrices, key=first_row)


def first_row(matrix: Matrix) -> int:
    """Where its rows begin in its parameter, or in its expert's part of that."""
    return matrix.rows[0] if matrix.rows else 0


def made_by_expert(
    matrices: Mapping[str, Matrix], value: Callable[[str], Tensor]
) -> dict[str, Apart]:
    """Parameters of experts by name, each expert's part made of `value` (out, in) of a matrix."""

    def make(own: dict[int, list[Matrix]], expert: int) -> Tensor:
        return _of_expert([(matrix, value(matrix.name)) for matrix in own[expert]])

    return {name: Apart(len(own), partial(make, own)) for name, own in by_expert(matrices).items()}


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
    rows = sorted(slices, key=lambda each: first_row(each[0]))
    value = rows[0][1] if len(rows) == 1 else torch.cat([value for _, value in rows])
    return value.t() if rows[0][0].transposed and value.dim() == 2 else value
