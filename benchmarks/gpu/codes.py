"""Codes of every grid and sums of integers: a GPU's must be a CPU's, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from gpu.check import Check, distance, share_apart
from lrquant.numerics.compiled import why_not
from lrquant.numerics.grids.grid import Grid, grid_kinds
from lrquant.numerics.grids.integer import IntegerGrid
from lrquant.numerics.products import integer_product
from lrquant.numerics.recipe import Recipe
from lrquant.numerics.tokens import fake_quantize_tokens
from lrquant.numerics.weights import fake_quantize_weight, quantize_weight

CPU = torch.device("cpu")
CLOSE = 1e-5  # of gradients, which are sums in another order
PRODUCTS = (1, 64, 64), (7, 100, 50), (16, 576, 1536), (17, 576, 1536), (33, 96, 192)
LARGE_PRODUCT = 2048, 4096, 4096


def codes(check: Check) -> None:
    """Every grid as it is: codes, scales, values on the grid, and their gradients."""
    rows, columns = (16, 128) if check.small else (512, 2048)
    for kind, grids in _grids(check.small).items():
        apart, gradients = 0.0, 0.0
        for grid in grids:
            expected, found = (_all_of(grid, rows, columns, each) for each in (CPU, check.device))
            apart = max(apart, *map(share_apart, found[0], expected[0]))
            gradients = max(gradients, *map(distance, found[1], expected[1]))
        check.say(
            f"{kind}, {len(grids)} grids",
            f"largest share apart {apart:.1e}, gradients {gradients:.1e}",
            apart == 0 and gradients < CLOSE,
        )


def compiled_codes(check: Check) -> None:
    """The same by compiled quantizers."""
    reason = why_not(check.device)
    if reason is not None:
        check.say("not compiled", reason, None if check.small else False)
        return
    rows, columns = (16, 128) if check.small else (512, 2048)
    grids = [IntegerGrid(4, None, False, torch.bfloat16)]
    if not check.small:
        grids += [IntegerGrid(3, 64, True, torch.bfloat16), IntegerGrid(8, None, True)]
    for grid in grids:
        if check.over(f"compiled {grid.name}"):
            return
        expected = _all_of(grid, rows, columns, CPU)
        found = _all_of(grid, rows, columns, check.device, compiled=True)
        apart = max(map(share_apart, found[0], expected[0]))
        gradients = max(map(distance, found[1], expected[1]))
        check.say(
            f"compiled {grid.name}, group {grid.group_size}",
            f"largest share apart {apart:.1e}, gradients {gradients:.1e}",
            apart == 0 and gradients < CLOSE,
        )


def integers(check: Check) -> None:
    """Products of int8 against those of float64."""
    for tokens, columns, rows in (*PRODUCTS, *(() if check.small else (LARGE_PRODUCT,))):
        generator = torch.Generator().manual_seed(0)
        left, right = (
            torch.randint(-128, 128, sides, dtype=torch.int8, generator=generator)
            for sides in ((tokens, columns), (rows, columns))
        )
        expected = (left.double() @ right.double().t()).int()
        found = integer_product(left.to(check.device), right.to(check.device)).cpu()
        equal = torch.equal(found, expected)
        check.say(f"{tokens} x {columns} x {rows}", "exact" if equal else "differs", equal)


def _grids(small: bool) -> dict[str, list[Grid]]:
    bits = (4,) if small else range(2, 9)
    return {
        kind: [
            make(each, size, symmetric, torch.bfloat16)
            for each in bits
            for size in (None, 64)
            for symmetric in (False, True)
        ]
        for kind, make in grid_kinds().items()
    }


class _Drawn:
    """Uniform values of a CPU's generator, taken to a device: the same for each."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._generator = device, torch.Generator().manual_seed(1)

    def __call__(self, *sides: int, low: float = 0.0) -> Tensor:
        return (torch.rand(sides, generator=self._generator) + low).to(self._device)


def _all_of(
    grid: Grid, rows: int, columns: int, device: torch.device, *, compiled: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """What must be equal, and gradients, of a weight under all of a recipe, and of tokens."""
    drawn, groups = _Drawn(device), columns // grid.size(columns)
    weight = drawn(rows, columns, low=-0.5).mul(0.1).bfloat16()
    leaves = {
        **{"rows": drawn(rows, low=0.5), "columns": drawn(columns, low=0.5)},
        **{name: drawn(rows, groups, low=0.5) for name in ("upper", "lower", "gain")},
        "offset": drawn(rows, columns, low=-0.5),
    }
    values, arriving = drawn(rows, columns, low=-0.5).requires_grad_(), drawn(rows, columns)
    recipe = Recipe(**{name: each.requires_grad_() for name, each in leaves.items()})
    value = fake_quantize_weight(weight, recipe, grid, torch.bfloat16, compiled=compiled)
    states = fake_quantize_tokens(values, grid, torch.bfloat16, compiled=compiled)
    scalar = ((value.float() + states.float()) * arriving).sum()
    gradients = torch.autograd.grad(scalar, [*leaves.values(), values])
    with torch.no_grad():
        quantized = quantize_weight(weight, recipe, grid)
    return [*quantized, value.detach(), states.detach()], list(gradients)
