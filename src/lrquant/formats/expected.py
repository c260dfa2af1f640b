"""The tensors that a checkpoint must hold: zeros of a model's shapes, packed by the format."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from lrquant.blocks.frozen import FrozenBlock, QuantizedMatrix
from lrquant.blocks.view import BlockView
from lrquant.errors import LRQuantError
from lrquant.formats.format import Format


def expected_block(
    view: BlockView, form: Format, dtype: torch.dtype, alone: Collection[str] = ()
) -> dict[str, Tensor]:
    """A block's tensors by name, relative to the block, on the meta device.

    `view` gives the shapes; parameters are packed one at a time; `alone` are matrices that have
    tensors of their own.  Raises LRQuantError where the format refuses a shape.
    """
    by_parameter: dict[str, list[str]] = {}
    for name, matrix in view.matrices.items():
        by_parameter.setdefault(matrix.parameter, []).append(name)
    quantized = view.shapes.quantized
    packed = {
        p: names
        for p, names in by_parameter.items()
        if any(n in quantized or n in alone for n in names)
    }
    biases = {view.matrices[n].bias for names in packed.values() for n in names}
    others = {n: t for n, t in view.stored.items() if n not in packed and n not in biases}
    tensors = form.tensors(FrozenBlock({}, others, {}), dtype)
    for names in packed.values():
        frozen = FrozenBlock(
            {name: _zeros(view, name) for name in names if name in quantized},
            {},
            {name: view.matrices[name] for name in names},
            {n: (_weight(view, n), _bias(view, n)) for n in names if n not in quantized},
        )
        own = form.tensors(frozen.apart(alone), dtype)
        tensors |= {name: tensor.to("meta") for name, tensor in own.items()}
    return tensors


def bits_of_weights(tensors: dict[str, Tensor], view: BlockView) -> tuple[int, int]:
    """Bits that all of the matrices' weights take, scales, zero points and shapes counted, and how
    many weights these are."""
    modules = {m.parameter.removesuffix(".weight") for m in view.matrices.values()}
    modules |= view.matrices.keys()
    sizes = [
        tensor.nbytes
        for name, tensor in tensors.items()
        if (name in modules or name.rpartition(".")[0] in modules) and not name.endswith(".bias")
    ]
    return 8 * sum(sizes), sum(view.weight(name).numel() for name in view.matrices)


def require_packable(
    view: BlockView, form: Format, dtype: torch.dtype, alone: Collection[str]
) -> None:
    """Refuse a block with several matrices in one tensor, if the format cannot hold that."""
    if any(not matrix.whole for name, matrix in view.matrices.items() if name not in alone):
        expected_block(view, form, dtype, alone)


def _weight(view: BlockView, matrix: str) -> Tensor:
    return torch.zeros(view.weight(matrix).shape)


def _bias(view: BlockView, matrix: str) -> Tensor | None:
    present = str(view.matrices[matrix].bias) in view.stored
    return torch.zeros(view.shapes.matrices[matrix].rows) if present else None


def _zeros(view: BlockView, matrix: str) -> QuantizedMatrix:
    """A matrix of a block's shapes whose codes are 0."""
    shape = view.shapes.matrices[matrix]
    grid, size = shape.grid, (shape.rows, shape.columns)
    if grid is None:
        raise LRQuantError(f"{matrix}: stays in floating point, so it has no codes")
    held = {kind for each in view.ingredients for kind in each.needs(view.shapes)}
    dense = torch.ones((shape.rows, 1)), torch.ones((1, shape.columns))
    return QuantizedMatrix(
        codes=torch.zeros(size, dtype=grid.stored_dtype),
        scale=torch.ones((shape.rows, shape.groups)),
        zero_point=torch.zeros((shape.rows, shape.groups)),
        bias=_bias(view, matrix),
        grid=grid,
        scheme=view.plan.schemes[matrix],
        factor=dense if "dense factor" in held else None,
        input_factor=torch.ones(shape.columns) if "input factor" in held else None,
        input_clip=torch.ones(2) if "input clip" in held and shape.input_grid is not None else None,
    )
