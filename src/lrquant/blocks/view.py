"""A block as it would be under its plan and parameters: one weight function for all uses."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from functools import cached_property, reduce

import torch
from torch import Tensor

from lrquant.blocks.assembly import assembled, assembled_biases, made_by_expert
from lrquant.blocks.experts import Apart, BlockTensors
from lrquant.blocks.folded import Folding, scaled_weight
from lrquant.blocks.frozen import FloatingMatrix, FrozenBlock, QuantizedMatrix
from lrquant.blocks.plan import BlockPlan
from lrquant.blocks.runner import INPUT_CLIP_SUFFIX, INPUT_FACTOR_SUFFIX
from lrquant.blocks.together import Batch, batches_of
from lrquant.errors import LRQuantError
from lrquant.ingredients.base.block import MatrixShape, Start
from lrquant.ingredients.base.folding import Factors
from lrquant.ingredients.base.statistics import ChannelStatistics
from lrquant.ingredients.ingredient import Ingredient, Parameters, owner_of
from lrquant.numerics.grids.grid import Grid
from lrquant.numerics.positions import Positions
from lrquant.numerics.recipe import Recipe
from lrquant.numerics.weights import (
    Extremes,
    Quantized,
    fake_quantize_weight,
    group_extremes,
    quantize_weight,
)


class BlockView:
    """One block's tensors under learnable parameters (a flat dict of float32 leaves).

    `still` names those that learning leaves as they are.
    `stored` are the block's own tensors on the computing device, never changed.  `by_expert` says
    that experts' weights are made one by one, while a block computes, and none of them kept.
    """

    def __init__(
        self,
        stored: dict[str, Tensor],
        plan: BlockPlan,
        ingredients: Sequence[Ingredient],
        dtype: torch.dtype,
        scale_dtype: torch.dtype | None = None,
        compiled: bool = False,
        by_expert: bool = False,
    ) -> None:
        self.stored, self.plan, self.dtype, self.compiled = stored, plan, dtype, compiled
        self.by_expert = by_expert
        self.ingredients = tuple(ingredients)
        self.matrices = plan.matrices
        self.shapes = plan.shapes(stored, scale_dtype)
        self.parameters: Parameters = {}
        self.still: frozenset[str] = frozenset()
        self._fixed: dict[str, QuantizedMatrix] = {}
        offsets = {f.module: f.offset for site in plan.sites for f in site.folds if f.offset}
        self._norms = [site.producer.module for site in plan.sites if site.kind == "norm"]
        held = {m.parameter for m in self.matrices.values()}
        held |= {str(m.bias) for m in self.matrices.values()}
        plain = {name: t.float() for name, t in stored.items() if name not in held}
        own = stored, self.matrices, self.shapes.matrices, plain, self._norms, offsets
        self._folding = Folding(*own)

    def weight(self, matrix: str) -> Tensor:
        """The stored weight (out, in) of a matrix."""
        declared = self.matrices[matrix]
        return declared.of(self.stored[declared.parameter])

    @cached_property
    @torch.no_grad()
    def _extremes(self) -> dict[str, Extremes]:
        """Ranges of the weights that no ingredient folds anything into: the same at every step."""
        factors = self._places()
        return {
            name: group_extremes(self.weight(name), shape.grid)
            for name, shape in self.shapes.quantized.items()
            if name not in factors.rows and name not in factors.columns and shape.grid is not None
        }

    def initialize(
        self, statistics: ChannelStatistics, still: Collection[str] = (), strength: float = 1.0
    ) -> None:
        """Set the parameters to their start, those that need to know what is folded last.

        Those of the matrices named by `still` stay there.
        """
        self.parameters, statistics = {}, statistics.on_host()
        for after in (False, True):
            factors = self._factors() if after else Factors()
            start = Start(self.plan.name, statistics, self.weight, factors, strength)
            for ingredient in self.ingredients:
                if ingredient.after_folds == after:
                    self.parameters |= ingredient.start(self.shapes, start)
        self.still = frozenset(name for name in self.parameters if owner_of(name) in still)

    @property
    def moving(self) -> Parameters:
        """The parameters that learning changes: integers are no more."""
        return {
            name: each
            for name, each in self.parameters.items()
            if name not in self.still and each.is_floating_point()
        }

    @torch.no_grad()
    def compact_(self) -> None:
        """Hold in little memory what is learned, and not to be learned any more."""
        for ingredient in self.ingredients:
            self.parameters |= ingredient.compacted(ingredient.own(self.moving))

    def load(self, parameters: Parameters) -> None:
        """Take what was kept of learned parameters; LRQuantError if it is not this block's."""
        expected = self.kept_shapes()
        shapes = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
        for name in sorted(expected.keys() | shapes.keys()):
            if shapes.get(name) != expected.get(name):
                raise LRQuantError(
                    f"learned parameters: {name} is {_words(shapes.get(name))} where this block "
                    f"needs it {_words(expected.get(name))}; they are of another run, learn again"
                )
        device = self.shapes.device
        kept = {name: tensor.to(device) for name, tensor in parameters.items()}
        self.parameters = {}
        for ingredient in self.ingredients:
            self.parameters |= ingredient.restored(ingredient.own(kept), self.shapes)

    @property
    def kept(self) -> Parameters:
        """What the run folder keeps of the parameters, once they are hardened."""
        return self._kept(self.parameters)

    def kept_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what is kept, by name."""
        return {name: tuple(tensor.shape) for name, tensor in self.empty_kept().items()}

    def empty_kept(self) -> Parameters:
        """What is kept, without its values: on the meta device."""
        shapes = self.parameter_shapes().items()
        return self._kept({name: torch.empty(shape, device="meta") for name, shape in shapes})

    def _kept(self, parameters: Parameters) -> Parameters:
        kept: Parameters = {}
        for ingredient in self.ingredients:
            kept |= ingredient.kept(ingredient.own(parameters))
        return kept

    @torch.no_grad()
    def harden_(self) -> None:
        """End learning: parameters of rounding become what they have led to, codes as they are."""
        factors, still = self._factors(), set(map(owner_of, self.still))
        for name, shape in self.shapes.quantized.items():
            recipe, extremes = self._recipe(name, factors), self._extremes.get(name)
            if recipe.offset is None or shape.grid is None or name in still:
                continue
            codes, nearest = (
                quantize_weight(self.weight(name), each, shape.grid, extremes).codes
                for each in (recipe, replace(recipe, offset=None))
            )
            for ingredient in self.ingredients:
                self.parameters |= ingredient.hardened(name, codes - nearest)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what is learned, by name."""
        shapes: dict[str, tuple[int, ...]] = {}
        for ingredient in self.ingredients:
            shapes |= ingredient.shapes(self.shapes)
        return shapes

    @torch.no_grad()
    def constrain_(self) -> None:
        """Bring the parameters back to where they may be, after a step."""
        for ingredient in self.ingredients:
            ingredient.constrain_(ingredient.own(self.moving))

    @property
    def shifted_norms(self) -> tuple[str, ...]:
        """Norms without a bias whose output the runner has to shift, whatever the parameters."""
        shifted = self._places().subtract
        return tuple(n for n in self._norms if n in shifted and f"{n}.bias" not in self.stored)

    @property
    def added(self) -> dict[str, Tensor]:
        """Biases and shifts that what is learned brings to the block, by name; values apart."""
        places = self._places()
        tensors = self._folding.others(places) | assembled_biases(
            self.matrices, self._folding.biases(places)
        )
        return {name: tensor for name, tensor in tensors.items() if name not in self.stored}

    def tensors(self) -> dict[str, Tensor]:
        """What the block computes with, differentiable in the parameters: see FrozenBlock."""
        factors = self._factors()
        tensors = self._folding.others(factors)
        biases = {name: bias.to(self.dtype) for name, bias in self._folding.biases(factors).items()}
        weights = {}
        together = {} if self.by_expert else self._together(factors)
        for name, shape in self.shapes.matrices.items():
            if not self._is_apart(name) and self.matrices[name].parameter not in together:
                weights[name] = self._computed(name, shape, factors)
            factor = self._input_factor(name)
            if factor is not None:
                tensors[name + INPUT_FACTOR_SUFFIX] = factor
            clip = self._input_clip(name)
            if clip is not None:
                tensors[str(shape.reads) + INPUT_CLIP_SUFFIX] = clip
        tensors |= assembled(self.matrices, weights) | together
        tensors |= assembled_biases(self.matrices, biases)
        return BlockTensors(tensors, self._apart(factors)) if self.by_expert else tensors

    def _together(self, factors: Factors) -> dict[str, Tensor]:
        """Parameters of experts of which many are made at once."""
        parameters = {}
        for name, batches in self._batches.items():
            if any(matrix in factors.columns for each in batches for matrix in each.matrices):
                continue
            made = [self._batch(each, factors) for each in batches]
            whole = [each for each in made if each is not None]
            if len(whole) == len(made):
                parameters[name] = torch.cat(whole)
        return parameters

    @cached_property
    def _batches(self) -> dict[str, list[Batch]]:
        return batches_of(self.matrices, self.shapes.matrices, self.stored)

    def _batch(self, batch: Batch, factors: Factors) -> Tensor | None:
        recipes = [self._recipe(name, factors) for name in batch.matrices]
        extremes = [self._extremes.get(name) for name in batch.matrices]
        stored = self.stored[batch.parameter]
        return batch.weights(stored, recipes, extremes, self.dtype, self.compiled)

    def _is_apart(self, matrix: str) -> bool:
        """Whether it is made while a block computes."""
        return self.by_expert and self.matrices[matrix].expert is not None

    def _apart(self, factors: Factors) -> dict[str, Apart]:
        def value(name: str) -> Tensor:
            return self._computed(name, self.shapes.matrices[name], factors)

        return made_by_expert(self.matrices, value)

    @property
    def views(self) -> tuple[BlockView, ...]:
        """The views of single blocks that this is made of: itself."""
        return (self,)

    @torch.no_grad()
    def frozen_tensors(self) -> dict[str, Tensor]:
        """What the block computes with out of codes and scales."""
        return self.freeze().tensors(self.dtype, by_expert=self.by_expert)

    @torch.no_grad()
    def freeze(self) -> FrozenBlock:
        """Codes, scales and folded tensors; the result's `tensors` equal the view's bit for bit."""
        factors = self._factors()
        others, biases = self._folding.others(factors), self._folding.biases(factors)
        matrices: dict[str, QuantizedMatrix] = {}
        floating: dict[str, FloatingMatrix] = {}
        for name, shape in self.shapes.matrices.items():
            bias = biases.get(name)
            if shape.grid is None:
                weight = self._computed(name, shape, factors)
                floating[name] = weight, None if bias is None else bias.to(self.dtype)
                continue
            matrices[name] = self._frozen(name, shape.grid, factors, bias)
        shared = {self.matrices[name].parameter for name in matrices}
        shared |= {m.parameter for m in self.matrices.values() if m.expert is not None}
        layout = {n: m for n, m in self.matrices.items() if m.parameter in shared}
        alone = {name: pair for name, pair in floating.items() if name not in layout}
        others |= assembled(self.matrices, {name: weight for name, (weight, _) in alone.items()})
        plain = {name: bias for name, (_, bias) in alone.items() if bias is not None}
        others |= assembled_biases(self.matrices, plain)
        unquantized = {name: pair for name, pair in floating.items() if name in layout}
        return FrozenBlock(matrices, others, layout, unquantized)

    def written(self) -> FrozenBlock:
        """As `freeze`, for files; on the host where the device may not hold all experts."""
        frozen = self.freeze()
        return frozen.on(torch.device("cpu")) if self.by_expert else frozen

    def _frozen(
        self, name: str, grid: Grid, factors: Factors, bias: Tensor | None = None
    ) -> QuantizedMatrix:
        recipe = self._recipe(name, factors).detached()
        codes, scale, zero_point = quantize_weight(
            self.weight(name), recipe, grid, self._extremes.get(name)
        )
        factor, clip = self._input_factor(name), self._input_clip(name)
        return QuantizedMatrix(
            codes.to(grid.stored_dtype),
            scale,
            zero_point,
            None if bias is None else bias.detach(),
            grid,
            self.plan.schemes[name],
            recipe.dense,
            None if factor is None else factor.detach(),
            None if clip is None else clip.detach(),
        )

    @torch.no_grad()
    def fix_(self, matrices: Iterable[str]) -> None:
        """Compute with these, of all, as they are now: out of codes, while parameters move."""
        self._fixed.clear()
        factors = self._factors()
        for name in matrices:
            grid = self.shapes.matrices[name].grid
            if grid is not None:
                self._fixed[name] = self._frozen(name, grid, factors)

    @torch.no_grad()
    def positions(self, frozen: FrozenBlock) -> dict[str, Positions]:
        """Where the weights of its quantised matrices lie, whose codes are those of `frozen`."""
        factors, positions = self._factors(), {}
        for name, shape in self.shapes.quantized.items():
            assert shape.grid is not None
            matrix, extremes = frozen.matrices[name], self._extremes.get(name)
            quantized = Quantized(matrix.codes, matrix.scale, matrix.zero_point)
            recipe = self._recipe(name, factors).detached()
            weight, grid = self.weight(name), shape.grid
            positions[name] = Positions.of(weight, recipe, grid, quantized, extremes)
        return positions

    def in_stored_units(
        self, matrix: str, inputs: Tensor, outputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What a matrix reads and gives under the parameters, (tokens, in) and (tokens, out), with
        the scales and shifts undone: ``outputs`` is then about ``inputs @ W.T + b``, all stored.
        """
        factors = self._factors()
        if matrix in factors.carried:
            inputs = inputs / factors.carried[matrix]
        if matrix in factors.columns:
            inputs = inputs * factors.columns[matrix]
        if matrix in factors.add:
            inputs = inputs + factors.add[matrix]
        if matrix in factors.rows:
            outputs = outputs / factors.rows[matrix]
        if matrix in factors.subtract:
            outputs = outputs + factors.subtract[matrix]
        return inputs, outputs

    def _factors(self) -> Factors:
        return self._factors_of(self.parameters)

    def _places(self) -> Factors:
        """What of the block is folded into: the factors of parameters that are all 1."""
        shapes = self.parameter_shapes().items()
        return self._factors_of(
            {
                name: torch.ones((), device=self.shapes.device).expand(shape)
                for name, shape in shapes
            }
        )

    def _factors_of(self, parameters: Parameters) -> Factors:
        factors = Factors()
        for ingredient in self.ingredients:
            if ingredient.own(parameters):
                ingredient.fold(self.shapes, parameters, factors)
        return factors

    def _recipe(self, matrix: str, factors: Factors) -> Recipe:
        recipe = Recipe(rows=factors.rows.get(matrix), columns=factors.columns.get(matrix))
        for ingredient in self.ingredients:
            share = ingredient.recipe(matrix, self.parameters)
            recipe = recipe if share is None else recipe & share
        return recipe

    def _input_factor(self, matrix: str) -> Tensor | None:
        shares = [each.input_factor(matrix, self.parameters) for each in self.ingredients]
        factors = [share for share in shares if share is not None]
        return reduce(torch.mul, factors) if factors else None

    def _input_clip(self, matrix: str) -> Tensor | None:
        asked = self.shapes, matrix, self.parameters
        shares = (each.input_clip(*asked) for each in self.ingredients)
        return next((clip for clip in shares if clip is not None), None)

    def _computed(self, matrix: str, shape: MatrixShape, factors: Factors) -> Tensor:
        """A weight (out, in) as products take it, with its factors and through its grid."""
        if matrix in self._fixed:
            return self._fixed[matrix].dequantize(self.dtype)
        weight = self.weight(matrix)
        if shape.grid is None:
            return scaled_weight(weight, matrix, factors, self.dtype)
        recipe = self._recipe(matrix, factors)
        rest = recipe, shape.grid, self.dtype, self._extremes.get(matrix)
        return fake_quantize_weight(weight, *rest, compiled=self.compiled)


def _words(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else f"of shape {shape}"
