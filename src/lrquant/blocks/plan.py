"""A plan: which matrices of a model's blocks lie on which grids, and what is learned of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from lrquant.architectures.matrix import Matrix
from lrquant.architectures.sites import Site
from lrquant.config.config import ingredient_kinds
from lrquant.config.groups import Quantizing
from lrquant.config.learned import BLOCKS
from lrquant.config.scheme import FLOATING_POINT, Scheme
from lrquant.config.schemes import Schemes
from lrquant.errors import LRQuantError
from lrquant.ingredients.base.block import BlockShapes, MatrixShape
from lrquant.ingredients.ingredient import Ingredient
from lrquant.model.model import Model
from lrquant.numerics.grids.grid import Grid
from lrquant.numerics.grids.schemes import activation_grid, attention_grid, weight_grid
from lrquant.numerics.hadamard import LEAST, hadamard, hadamard_size


@dataclass(frozen=True)
class Plan:
    """Schemes by matrix, what is learned, and the dtype that scales are stored in (None: that of
    the weights), of a language part and of a vision tower."""

    schemes: Schemes
    ingredients: tuple[Ingredient, ...] = ()
    tower_ingredients: tuple[Ingredient, ...] = ()
    scale_dtype: torch.dtype | None = None

    @classmethod
    def of(cls, asked: Quantizing) -> Plan:
        """What resolved settings ask for."""
        dtype = None if asked.save_dtype is None else getattr(torch, asked.save_dtype)
        language, tower = (
            cast(tuple[Ingredient, ...], own)
            for own in (asked.ingredients, asked.tower_ingredients)
        )
        return cls(asked.schemes, language, tower, dtype)

    @property
    def tower(self) -> Plan:
        """The plan of the vision tower, seen as a model of its own."""
        return Plan(self.schemes.of_tower, self.tower_ingredients, (), self.scale_dtype)

    @property
    def of_blocks(self) -> Plan:
        """The same as far as it is learned block by block."""
        own = tuple(each for each in self.ingredients if each.stage == BLOCKS)
        return replace(self, ingredients=own)

    @property
    def unlearned(self) -> Plan:
        """The same schemes with nothing learned: weights are rounded to nearest."""
        return Plan(self.schemes, scale_dtype=self.scale_dtype)

    @property
    def needs_statistics(self) -> bool:
        """Whether what is learned of the language part needs statistics, whatever files give."""
        return any(each.needs_statistics for each in self.ingredients)

    @property
    def reads_statistics(self) -> bool:
        """Whether what is learned of the language part makes use of given statistics."""
        return any(each.reads_statistics for each in self.ingredients)


FULL_PRECISION = Plan(Schemes(FLOATING_POINT))


@dataclass(frozen=True)
class BlockPlan:
    """One block: its full name, its matrices and sites, and the scheme of each matrix.

    `alone` are the matrices that stay as they are, in a model of which others do not.
    """

    name: str
    matrices: Mapping[str, Matrix]
    sites: tuple[Site, ...]
    schemes: Mapping[str, Scheme]
    alone: frozenset[str] = frozenset()

    @property
    def attention(self) -> Grid | None:
        """The grid of Q, K and V."""
        return attention_grid(self.attention_scheme)

    @property
    def attention_scheme(self) -> Scheme:
        """That of Q, K and V: they follow the block's first matrix."""
        return next(iter(self.schemes.values()))

    @property
    def attention_module(self) -> str:
        """Full name of the module that attends: the one that holds the block's first matrix."""
        first = next(iter(self.matrices.values()))
        return f"{self.name}.{first.parameter.rsplit('.', 2)[0]}"

    @property
    def inputs(self) -> dict[str, Grid | None]:
        """The grid of what each module reads; LRQuantError where its matrices disagree."""
        grids: dict[str, Grid | None] = {}
        for name, matrix in self.matrices.items():
            grid = activation_grid(self.schemes[name])
            if matrix.reads is None:
                if grid is not None:
                    raise LRQuantError(
                        f"{self.name}.{name}: its inputs stay inside {matrix.parameter}, so they "
                        "cannot be quantised; leave its activations at 16 bits: "
                        f"--scheme-for '{name}=W{self.schemes[name].weight_bits}A16'"
                    )
            elif grids.setdefault(matrix.reads, grid) != grid:
                raise LRQuantError(
                    f"{self.name}.{matrix.reads}: its parts read one input; give them the same "
                    "activation bits"
                )
        return grids

    @property
    def rotated(self) -> frozenset[str]:
        """Modules that read their input times a Hadamard matrix; LRQuantError as for `inputs`."""
        readers: dict[str, bool] = {}
        for name, matrix in self.matrices.items():
            rotated = self.schemes[name].hadamard
            if matrix.reads is None:
                if rotated:
                    raise LRQuantError(
                        f"{self.name}.{name}: its inputs stay inside {matrix.parameter}, so they "
                        f"cannot be multiplied; leave it out: --scheme-for '{name}="
                        f"{replace(self.schemes[name], hadamard=False).name}'"
                    )
            elif readers.setdefault(matrix.reads, rotated) != rotated:
                raise LRQuantError(
                    f"{self.name}.{matrix.reads}: its parts read one input; give all of them "
                    "-hadamard, or none"
                )
        return frozenset(name for name, rotated in readers.items() if rotated)

    def rotate(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """The block's own tensors with the weights of `rotated` matrices times Hadamard ones."""
        tensors = dict(stored)
        for name, matrix in self.matrices.items():
            if self.schemes[name].hadamard:
                whole = tensors[matrix.parameter]
                if whole is stored[matrix.parameter]:
                    whole = tensors[matrix.parameter] = whole.clone()
                own = matrix.of(whole)
                own.copy_(hadamard(own))
        return tensors

    def shapes(self, stored: Mapping[str, Tensor], scale_dtype: torch.dtype | None) -> BlockShapes:
        """Shapes and grids of the block's stored tensors; LRQuantError for odd groups."""
        matrices = {}
        for name, matrix in self.matrices.items():
            parameter = stored[matrix.parameter]
            rows, columns = matrix.of(parameter).shape
            dtype = scale_dtype or parameter.dtype
            half = dtype in (torch.bfloat16, torch.float16)
            grid = weight_grid(self.schemes[name], dtype if half else torch.float32)
            require_groups(name, columns, self.schemes[name])
            require_hadamard(name, columns, self.schemes[name])
            reads, across = matrix.reads, activation_grid(self.schemes[name])
            matrices[name] = MatrixShape(rows, columns, grid, reads, matrix.whole, across)
        modules = {name.removesuffix(".bias") for name in stored if name.endswith(".bias")}
        own = {n for n, m in self.matrices.items() if m.bias is not None and m.bias in stored}
        device = next(iter(stored.values())).device
        folded = {f.module for site in self.sites for f in site.folds if f.axis != "norm"}
        able = {name for name, matrix in self.matrices.items() if matrix.bias is not None}
        biased = frozenset(modules | own)
        unbiased = frozenset(folded - able - biased)
        return BlockShapes(matrices, self.sites, biased, device, unbiased, self.alone)


def plan_block(model: Model, index: int, schemes: Schemes) -> BlockPlan:
    """Block `index` of a part of a model under its schemes."""
    name = model.block_name(index)
    matrices = {matrix.name: matrix for matrix in model.matrices(index)}
    own = {each: schemes.of(f"{name}.{each}") for each in matrices}
    floating = frozenset(n for n, scheme in own.items() if scheme.floating_point)
    alone = frozenset() if schemes.floating_point else floating
    rotated = {each for each, scheme in own.items() if scheme.hadamard}
    sites = tuple(site for site in model.sites(index) if not _enters(site, rotated))
    plan = BlockPlan(name, matrices, sites, own, alone)
    if plan.attention is not None and model.architecture.own_attention:
        raise LRQuantError(
            f"{plan.attention_module}: attention is computed in this family's own code, where Q, K "
            "and V can't be quantised; use --qkv_bits 16"
        )
    return plan


def _enters(site: Site, rotated: AbstractSet[str]) -> bool:
    """Whether a site's scales would have to pass a Hadamard matrix, which mixes channels."""
    return any(fold.axis == "columns" and fold.module in rotated for fold in site.folds)


def require_hadamard(name: str, columns: int, scheme: Scheme) -> None:
    """Refuse a Hadamard matrix that mixes hardly any channels."""
    size = hadamard_size(columns)
    if scheme.hadamard and size < LEAST:
        raise LRQuantError(
            f"{name}: its {columns} input columns divide into blocks of {size}, and a Hadamard "
            f"matrix is to mix {LEAST} at least; leave it out: --scheme-for "
            f"'{name}={replace(scheme, hadamard=False).name}'"
        )


def require_groups(name: str, columns: int, scheme: Scheme) -> None:
    """Refuse groups, of a matrix or of what it reads, that do not divide its columns."""
    for what, grid in (
        ("group size", weight_grid(scheme)),
        ("activation group size", activation_grid(scheme)),
    ):
        size = 1 if grid is None else grid.size(columns)
        if columns % size:
            fitting = [n for n in range(16, columns + 1) if columns % n == 0]
            raise LRQuantError(
                f"{what} {size} does not divide the {columns} input columns of {name}; "
                f"sizes that do: {', '.join(map(str, fitting))}"
            )


def learned_by(**settings: object) -> tuple[Ingredient, ...]:
    """Ingredients by their own settings, as `let=True, let_shift="never"`; no default is chosen."""
    ingredients = []
    for kind in ingredient_kinds():
        names = {entry.name for entry in dataclasses.fields(kind)}  # type: ignore[arg-type]
        own = {name: value for name, value in settings.items() if name in names}
        if own.get(kind.switch):
            ingredient = kind(**own)
            ingredients.append(cast(Ingredient, kind(**ingredient.settled())))
    return tuple(ingredients)
