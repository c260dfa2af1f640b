"""A format on disk: what it holds, and how a block's tensors are named and packed in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import torch
from torch import Tensor

from lrquant.blocks.frozen import FrozenBlock
from lrquant.blocks.plan import BlockPlan
from lrquant.config.scheme import Scheme
from lrquant.config.schemes import Schemes
from lrquant.files.whole import JsonObject
from lrquant.formats.loading import Loading
from lrquant.formats.parts import Part
from lrquant.model.published import Published

HADAMARD = "hadamard"
Decode = Callable[[dict[str, Tensor], str, JsonObject], dict[str, Tensor]]


@dataclass(frozen=True)
class Format:
    """What is special to a format: what it holds, and how a block's tensors are named and packed.

    `refusal` returns why a model of such schemes cannot be written so and what would do, or None.
    `tensors` gives a block's tensors, named relative to the block, floating-point ones in the
    checkpoint's dtype.
    `quantization_config` is what config.json says of it, or None for dense weights; it is given the
    quantised parts of the model, the language part first, and the names of the linears outside
    them, which stay as they are.
    `decode` undoes `tensors` by what config.json says alone: given a block's stored tensors, its
    full name and the quantization_config, it returns dense ones; shifts and input factors stay,
    Hadamard matrices are multiplied back into weights.
    `loading` says how a runtime (one of `TARGETS`) takes a scheme that the format holds, and what
    it then computes.
    `shape_refusal` returns why a weight (out, in) of that many rows and columns cannot be written,
    or None; `dtype` is the checkpoint's for a model's; `holds` are what of ingredients' `held_as`
    it has a place for, and `HADAMARD` where inputs can be multiplied by such matrices; `grids` are
    the kinds of grids, all of them if empty.
    `experts_apart` says that each expert's quantised matrices are linears of their own in it even
    where the model's own files hold them all in one tensor.
    `experts` returns why it can't hold the matrices of a block's experts, which it is given as
    linears of their own, under their own schemes beside all others, or None.
    """

    name: str
    refusal: Callable[[Schemes], str | None]
    tensors: Callable[[FrozenBlock, torch.dtype], dict[str, Tensor]]
    quantization_config: Callable[[Sequence[Part], list[str]], JsonObject | None]
    loading: Callable[[Scheme, str], Loading] = lambda scheme, target: Loading(
        "this format does not say which runtimes load it"
    )
    decode: Decode = lambda tensors, block, quantization: dict(tensors)
    shape_refusal: Callable[[int, int], str | None] = lambda rows, columns: None
    dtype: Callable[[torch.dtype], torch.dtype] = lambda model: model
    holds: frozenset[str] = frozenset()
    grids: frozenset[str] = frozenset({"int"})
    experts_apart: bool = False
    experts: Callable[[Schemes, AbstractSet[Scheme]], str | None] = lambda schemes, own: (
        "it holds no experts; use --format dequantized or lrquant"
    )

    def alone(self, plan: BlockPlan, published: Published) -> frozenset[str]:
        """The matrices of a block that have tensors of their own in it."""
        own = published.alone(plan.name)
        experts = frozenset(n for n, matrix in plan.matrices.items() if matrix.expert is not None)
        packed = any(plan.schemes[name].quantizes_weights for name in experts)
        return own | experts if self.experts_apart and packed else own

    def schemes_refusal(self, schemes: Schemes) -> str | None:
        """Why it cannot hold a model of such schemes, whatever is learned, or None."""
        reason = self.grid_refusal(schemes) or self.hadamard_refusal(schemes)
        return reason or self.refusal(schemes)

    def grid_refusal(self, schemes: Schemes) -> str | None:
        """Why it cannot hold the kind of a grid, or None."""
        odd = [s.weight_grid for s in schemes.every if s.quantizes_weights]
        odd = [kind for kind in odd if self.grids and kind not in self.grids]
        if not odd:
            return None
        return f"it holds no {odd[0]!r} grids; use one of {', '.join(sorted(self.grids))}"

    def hadamard_refusal(self, schemes: Schemes) -> str | None:
        """Why it cannot say that inputs are multiplied by Hadamard matrices, or None."""
        rotated = [scheme for scheme in schemes.every if scheme.hadamard]
        if not rotated or HADAMARD in self.holds:
            return None
        return (
            f"{rotated[0].name}: nothing in it multiplies inputs by Hadamard matrices; use "
            "--format lrquant, or learn without -hadamard"
        )
