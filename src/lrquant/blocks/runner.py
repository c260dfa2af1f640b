"""One block under hooks, a whole model's head, and a block that is ready to run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from lrquant.blocks.attention import attention_config, attention_name
from lrquant.blocks.experts import Apart, BlockTensors, ExpertModules, Inside
from lrquant.blocks.residuals import in_line, stacked
from lrquant.blocks.stubs import Arguments
from lrquant.numerics.grids.grid import Grid
from lrquant.numerics.hadamard import hadamard
from lrquant.numerics.tokens import fake_quantize_tokens

SHIFT_SUFFIX = ".shift"  # tensors named so are added to the output of a norm that has no bias
INPUT_FACTOR_SUFFIX = ".input_factor"  # these multiply the input of a linear
INPUT_CLIP_SUFFIX = ".input_clip"  # and these say how much of an input's range its grids span
_SUFFIXES = (SHIFT_SUFFIX, INPUT_FACTOR_SUFFIX, INPUT_CLIP_SUFFIX)
Observer = Callable[[str, Tensor], None]
How = tuple[Tensor | None, Grid | None, bool]  # a clipping, a grid, times a Hadamard matrix or not


@dataclass(frozen=True)
class PreparedBlock:
    """A block ready to run: its runner (not yet entered) and the tensors it computes with."""

    runner: BlockRunner
    tensors: dict[str, Tensor]


Prepare = Callable[[int], PreparedBlock]


@dataclass(frozen=True)
class Variant:
    """A model as it is to compute: how block i is made ready, and block i of the vision tower."""

    blocks: Prepare
    tower: Prepare | None = None

    def __call__(self, index: int) -> PreparedBlock:
        """Block `index` of the language part."""
        return self.blocks(index)


class BlockRunner:
    """One block's forward with given tensors; a context manager that holds the hooks.

    The residual stream and the norms are float32; what the modules named by `inputs` read is put on
    their grid, Q, K and V on that of `attention`, then cast to `dtype`, in which products run.
    Consumers of one tensor share its quantised form.  Before that it is multiplied by a Hadamard
    matrix where `rotated` names who reads it, and Q and K are where `heads_rotated`.  `shifted`
    names norms without a bias whose output takes a shift; a linear that has an input factor reads
    its input times that; `observer` is told (module, unquantised input (batch, tokens, in)).
    Where a block computes attention by `own_attention`, that runs in float32, on what linears give.

    Names among `inputs` that are no modules are of what experts read inside theirs.  While
    `all_experts`, the observer is told of these too, as if every token went to every expert;
    `router` is told (module, experts of each token (tokens, chosen)).
    """

    def __init__(
        self,
        block: nn.Module,
        inputs: Mapping[str, Grid | None],
        attention: Grid | None,
        dtype: torch.dtype,
        shifted: Sequence[str] = (),
        observer: Observer | None = None,
        own_attention: bool = False,
        compiled: bool = False,
        residuals: int = 1,
        rotated: Collection[str] = (),
        heads_rotated: bool = False,
    ) -> None:
        self.block, self.inputs, self.attention, self.shifted = block, inputs, attention, shifted
        self.own_attention, self.compiled = own_attention, compiled
        self.residuals, self.rotated = residuals, rotated
        self.heads_rotated = heads_rotated
        self.config = None if own_attention else attention_config(block)
        self._attention_before = getattr(self.config, "_attn_implementation", None)
        self._attention_name = attention_name(attention, dtype, compiled, heads_rotated)
        self.dtype, self.observer = dtype, observer
        self.all_experts = False
        self.router: Observer | None = None
        self._experts = ExpertModules.of(block)
        self._places = self._experts.places(inputs)
        self._handles: list[RemovableHandle] = []
        self._last: tuple[Tensor, How, Tensor] | None = None
        self._leading = torch.Size((0, 0))
        self._extras: dict[str, Tensor] = {}
        self._apart: Mapping[str, Apart] = {}

    def __enter__(self) -> BlockRunner:
        inside = {place for places in self._places.values() for place in places.values()}
        inside |= self._experts.in_rows
        for name in (each for each in self.inputs if each not in inside):
            reader = self.block.get_submodule(name)
            self._handles.append(reader.register_forward_pre_hook(partial(self._before, name)))
            if self.own_attention:
                self._handles.append(reader.register_forward_hook(_in_float32))
        for name in self.shifted:
            norm = self.block.get_submodule(name)
            self._handles.append(norm.register_forward_hook(partial(self._after_norm, name)))
        self._handles.append(self.block.register_forward_pre_hook(self._before_block))
        after = self.block.register_forward_hook(self._after_block, always_call=True)
        self._handles.append(after)
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __call__(
        self, tensors: dict[str, Tensor], hidden_states: Tensor, arguments: Arguments
    ) -> Tensor:
        """Block output (batch, tokens, hidden), float32, with `tensors` in place of parameters.

        Hidden states of packed pictures are (patches, hidden); several `residuals` are
        in line.
        """
        self._leading = hidden_states.shape[:-1]
        states = stacked(hidden_states, self.residuals)
        output = functional_call(self.block, self.bind(tensors), (states,), arguments)
        return in_line(output[0] if isinstance(output, tuple) else output, self.residuals)

    def bind(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Keep what the hooks apply among `tensors`; the rest are the block's parameters."""
        self._extras = {name: t for name, t in tensors.items() if name.endswith(_SUFFIXES)}
        self._apart = tensors.apart if isinstance(tensors, BlockTensors) else {}
        return {name: t for name, t in tensors.items() if name not in self._extras}

    def on(self, block: nn.Module) -> BlockRunner:
        """The same hooks for another block of the same shape."""
        return BlockRunner(
            block,
            self.inputs,
            self.attention,
            self.dtype,
            self.shifted,
            own_attention=self.own_attention,
            residuals=self.residuals,
            rotated=self.rotated,
            heads_rotated=self.heads_rotated,
        )

    def _before(
        self, name: str, module: nn.Module, inputs: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        values, *rest = inputs
        self._tell(name, values)
        return (self._read(name, values), *rest)

    def _tell(self, name: str, values: Tensor) -> None:
        """The observer, of values (batch, tokens, in) as weights multiply them."""
        if self.observer is not None:
            values = self._rotated(name, values)
            shaped = values.shape[:-1].numel() == self._leading.numel()
            self.observer(name, values.reshape(*self._leading, -1) if shaped else values)

    def _read(self, name: str, values: Tensor) -> Tensor:
        """What products take of what is read under a name."""
        factor = self._extras.get(name + INPUT_FACTOR_SUFFIX)
        clip = self._extras.get(name + INPUT_CLIP_SUFFIX)
        grid = self.inputs[name]
        if factor is not None:
            return self._quantized(self._rotated(name, values) * factor, grid, clip)
        last, how = self._last, (clip, grid, name in self.rotated)
        if last is None or last[0] is not values or not _same(last[1], how):
            own = self._quantized(self._rotated(name, values), grid, clip)
            self._last = last = values, how, own
        return last[2]

    def _rotated(self, name: str, values: Tensor) -> Tensor:
        """What is read under a name, times a Hadamard matrix where it is to be."""
        return hadamard(values) if name in self.rotated else values

    def _quantized(self, values: Tensor, grid: Grid | None, clip: Tensor | None) -> Tensor:
        """What products take, in their dtype."""
        if grid is None:
            return values.to(self.dtype)
        return fake_quantize_tokens(values, grid, self.dtype, clip, compiled=self.compiled)

    def _after_norm(self, name: str, module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return output + self._extras[name + SHIFT_SUFFIX]

    def _before_block(self, module: nn.Module, inputs: object) -> None:
        """All blocks may read one configuration: it says this block's attention while it runs."""
        if self.config is not None:
            self._attention_before = self.config._attn_implementation
            self.config._attn_implementation = self._attention_name
        self._experts.enter(
            {
                name: Inside(
                    places,
                    self._read,
                    None if self.observer is None else self._tell,
                    None if self.router is None else partial(self.router, name),
                    name,
                    {
                        parameter.removeprefix(f"{name}."): each
                        for parameter, each in self._apart.items()
                        if parameter.startswith(f"{name}.")
                    },
                    self.all_experts,
                )
                for name, places in self._places.items()
            }
        )

    def _after_block(self, module: nn.Module, inputs: object, output: object) -> None:
        if self.config is not None:
            self.config._attn_implementation = self._attention_before
        self._experts.leave()
        self._last = None


def _same(how: How, other: How) -> bool:
    """Whether values are read in one way: with the very same clipping."""
    return how[0] is other[0] and how[1:] == other[1:]


def _in_float32(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    return output.float()
