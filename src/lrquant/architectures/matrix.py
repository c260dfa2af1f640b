"""A matrix: a named two-dimensional slice of a parameter that a checkpoint stores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Matrix:
    """A weight (out, in): a linear's, some rows of a fused one, one expert of a 3-D parameter.

    `name` is what schemes, sites and formats call it, relative to its block: for the whole of a
    linear that of the module.  `parameter` is the stored tensor, `expert` its index along a first
    axis, and `rows` the first row and the one after the last, of outputs; `transposed` says that
    inputs come first in the store.  `reads` names the module whose first input it multiplies; of an
    expert's second matrix, whose input stays inside that of the experts, it is its own name; None
    where nothing tells of the input, so that it cannot be quantised.  `bias` is the stored bias.
    """

    name: str
    parameter: str
    rows: tuple[int, int] | None = None
    expert: int | None = None
    transposed: bool = False
    reads: str | None = None
    bias: str | None = None

    @property
    def whole(self) -> bool:
        """Whether it is all of the weight of the module that it is named by."""
        sliced = self.rows is not None or self.expert is not None or self.transposed
        return not sliced and self.parameter == f"{self.name}.weight"

    def of(self, parameter: Tensor) -> Tensor:
        """Its values (out, in) in the stored parameter, a view."""
        values = parameter if self.expert is None else parameter[self.expert]
        values = values.t() if self.transposed else values
        return values if self.rows is None else values[slice(*self.rows)]

    def of_bias(self, bias: Tensor) -> Tensor:
        """Its values (out,) in the stored bias, a view."""
        values = bias if self.expert is None else bias[self.expert]
        return values if self.rows is None else values[slice(*self.rows)]


def linear(module: str) -> Matrix:
    """All of the weight of an `nn.Linear`."""
    return Matrix(module, f"{module}.weight", reads=module, bias=f"{module}.bias")


def linears(*modules: str) -> tuple[Matrix, ...]:
    """All of the weights of some `nn.Linear`s."""
    return tuple(map(linear, modules))


def fused_linear(module: str, **rows: int) -> tuple[Matrix, ...]:
    """Parts of an `nn.Linear` by name and number of rows, in their order: `MODULE.NAME`."""
    slices, start = [], 0
    for name, count in rows.items():
        span = (start, start + count)
        start += count
        slices.append(
            Matrix(
                f"{module}.{name}", f"{module}.weight", span, reads=module, bias=f"{module}.bias"
            )
        )
    return tuple(slices)


def experts(
    module: str,
    parameter: str,
    count: int,
    *,
    reads_input: bool,
    transposed: bool = False,
    **rows: int,
) -> tuple[Matrix, ...]:
    """Each expert's part of a 3-D parameter (experts, out, in) of a module: `MODULE.INDEX.NAME`.

    `rows` names the parts along the outputs, as of a fused gate and up; `reads_input` says that
    they multiply the module's own input, and not what stays inside it.  The module computes through
    transformers' interface of experts.
    """
    return parts_of_experts(module, parameter, count, rows, reads_input, transposed)


def parts_of_experts(
    module: str,
    parameter: str,
    count: int,
    rows: Mapping[str, int],
    reads_input: bool,
    transposed: bool = False,
    bias: str | None = None,
) -> tuple[Matrix, ...]:
    """The same, of `rows` by names that are known when it runs; `bias` (experts, out) is theirs."""
    matrices = []
    for expert in range(count):
        start = 0
        for name, size in rows.items():
            span = (start, start + size)
            start += size
            own = f"{module}.{expert}.{name}"
            reads = module if reads_input else own
            stored = None if bias is None else f"{module}.{bias}"
            matrices.append(
                Matrix(own, f"{module}.{parameter}", span, expert, transposed, reads, stored)
            )
    return tuple(matrices)
