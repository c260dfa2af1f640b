"""A model held against its family's declaration: every matrix of every block is accounted for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from transformers import PreTrainedModel

from lrquant.architectures import Architecture, find_tower
from lrquant.architectures.matrix import Matrix
from lrquant.errors import LRQuantError


def require_declared(skeleton: PreTrainedModel, architecture: Architecture) -> None:
    """Refuse a block with a linear, or another parameter of two or more axes, that its family
    declares neither as matrices that cover it nor as kept, and matrices that are not there.
    """
    tower = find_tower(architecture, skeleton.config)
    for part in (architecture,) if tower is None else (architecture, tower):
        config = part.part(skeleton.config)
        blocks = skeleton.get_submodule(part.blocks)
        assert isinstance(blocks, nn.ModuleList)
        for index, block in enumerate(blocks):
            matrices = part.matrices(config, index)
            _require_linears(part.name, index, block, matrices, part.kept(config, index))
            parameters = dict(block.named_parameters())
            _require_covered(part, index, parameters, matrices, part.kept(config, index))


def _require_linears(
    family: str, index: int, block: nn.Module, matrices: Sequence[Matrix], kept: Sequence[str]
) -> None:
    linears = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    present = {name for name in linears if f"{name}.weight" not in kept}
    of_linears = {m.parameter.removesuffix(".weight") for m in matrices if _of_linear(m, linears)}
    if present != of_linears:
        odd = ", ".join(sorted(present ^ of_linears))
        raise LRQuantError(
            f"model family {family!r}: the linears of block {index} and the declared ones differ "
            f"({odd}); the declaration does not fit this model"
        )


def _of_linear(matrix: Matrix, linears: set[str]) -> bool:
    """Whether a matrix says that it is one of a linear: of one that is there, or not."""
    return matrix.parameter.removesuffix(".weight") in linears or matrix.whole


def _require_covered(
    part: Architecture,
    index: int,
    parameters: Mapping[str, Tensor],
    matrices: Sequence[Matrix],
    kept: Sequence[str],
) -> None:
    declared: dict[str, list[Matrix]] = {}
    biases = {matrix.bias for matrix in matrices}
    for matrix in matrices:
        declared.setdefault(matrix.parameter, []).append(matrix)
    start = f"model family {part.name!r}: "
    names = Counter(matrix.name for matrix in matrices)
    for name in [name for name, count in names.items() if count > 1]:
        raise LRQuantError(f"{start}{name} of block {index} is the name of several matrices")
    for name in sorted(declared.keys() - parameters.keys()):
        raise LRQuantError(f"{start}block {index} has no {name}; the declaration does not fit it")
    for name, parameter in parameters.items():
        if parameter.dim() < 2 or name in kept or name in biases:
            continue
        if not _cover(declared.get(name, ()), parameter):
            said = (
                "only in part, or twice" if name in declared else "neither as a matrix nor as kept"
            )
            raise LRQuantError(
                f"{start}{name} of block {index}, {tuple(parameter.shape)}, is declared {said}; "
                "see docs/add-an-architecture.md"
            )


def _cover(matrices: Sequence[Matrix], parameter: Tensor) -> bool:
    """Whether matrices are all of a parameter, each of its values once."""
    by_expert: dict[int | None, list[Matrix]] = {}
    for matrix in matrices:
        by_expert.setdefault(matrix.expert, []).append(matrix)
    experts = {None} if parameter.dim() == 2 else set(range(len(parameter)))
    return by_expert.keys() == experts and all(
        _cover_rows(slices, parameter) for slices in by_expert.values()
    )


def _cover_rows(slices: Sequence[Matrix], parameter: Tensor) -> bool:
    rows = parameter.shape[-1 if slices[0].transposed else -2]
    spans = sorted(each.rows or (0, rows) for each in slices)
    return [0, *(stop for _, stop in spans)] == [*(start for start, _ in spans), rows]
