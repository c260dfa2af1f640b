"""Experts of a block, one after the other, under a name that transformers knows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "lrquant"
_INSIDE = "_lrquant_inside"
Read = Callable[[str, Tensor], Tensor]
Watch = Callable[[str, Tensor], None]
Make = Callable[[int], Tensor]


@dataclass(frozen=True)
class Apart:
    """A parameter of `count` experts, of which `make` makes one's part when it is used."""

    count: int
    make: Make

    def stacked(self) -> Tensor:
        """The parameter (experts, …)."""
        return torch.stack([self.make(expert) for expert in range(self.count)])


class BlockTensors(dict[str, Tensor]):
    """What a block computes with, by name, without parameters of experts that are `apart`."""

    def __init__(self, tensors: Mapping[str, Tensor], apart: Mapping[str, Apart]) -> None:
        super().__init__(tensors)
        self.apart = apart

    @staticmethod
    def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors with all parameters of experts among them."""
        if not isinstance(tensors, BlockTensors):
            return tensors
        return {**tensors, **{name: each.stacked() for name, each in tensors.apart.items()}}


@dataclass
class Inside:
    """What is done inside a module of experts: `places` names what each one's second matrix reads.

    `read` makes of such values (tokens, width) what products take.  `observe` is told what an
    expert would read if every token went to it; `route` of the tokens' experts (tokens, chosen).
    `apart` are the module's parameters, by their names in it, of which each expert's part is made
    when it computes, and once more for its gradient.
    """

    places: Mapping[int, str]
    read: Read
    observe: Watch | None = None
    route: Callable[[Tensor], None] | None = None
    apart: Mapping[str, Apart] = field(default_factory=dict)

    def of(self, module: nn.Module, name: str) -> Make:
        """What gives an expert's part of a parameter.

        Of a whole one all are taken at once: each by itself would have a gradient as large as it.
        """
        if name in self.apart:
            return self.apart[name].make
        return getattr(module, name).unbind().__getitem__


@dataclass
class ExpertModules:
    """The modules of experts in a block, which compute as a runner says while it runs."""

    modules: dict[str, nn.Module] = field(default_factory=dict)
    _before: dict[str, str | None] = field(default_factory=dict)

    @classmethod
    def of(cls, block: nn.Module) -> ExpertModules:
        """Those that transformers lets compute by another function."""
        ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
        modules = block.named_modules()
        return cls({name: module for name, module in modules if hasattr(module, "has_gate")})

    def places(self, readers: Iterable[str]) -> dict[str, dict[int, str]]:
        """Of names of what is read, those inside each module, by the expert's number."""
        places: dict[str, dict[int, str]] = {name: {} for name in self.modules}
        for reader in readers:
            for name in self.modules:
                number, _, matrix = reader.removeprefix(f"{name}.").partition(".")
                if reader.startswith(f"{name}.") and matrix and number.isdecimal():
                    places[name][int(number)] = reader
        return places

    def enter(self, inside: Mapping[str, Inside]) -> None:
        """All blocks may read one configuration: it says how experts compute while one runs."""
        for name, module in self.modules.items():
            config = getattr(module, "config")  # noqa: B009
            self._before[name] = config._experts_implementation
            config._experts_implementation = NAME
            setattr(module, _INSIDE, inside[name])

    def leave(self) -> None:
        """Let them compute as they did before."""
        for name, before in reversed(self._before.items()):
            module = self.modules[name]
            getattr(module, "config")._experts_implementation = before  # noqa: B009
            delattr(module, _INSIDE)
        self._before.clear()


def experts_forward(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Output (tokens, hidden) of the experts that each token (tokens, hidden) goes to.

    `top_k_index` and `top_k_weights` (tokens, chosen) name and weigh them.  A token's outputs are
    added in the order in which they were chosen, in float32 or what is wider.
    """
    inside: Inside = getattr(module, _INSIDE)
    if inside.route is not None:
        inside.route(top_k_index)
    experts = _Weights.of(module, inside)
    if inside.observe is not None:
        for expert, place in inside.places.items():
            inside.observe(place, experts.entered(expert, hidden_states))
    chosen = top_k_index.shape[1]
    order = top_k_index.flatten().argsort(stable=True)
    counts = top_k_index.flatten().bincount(minlength=experts.count).tolist()
    computed = partial(_computed, inside, experts)
    if inside.apart and torch.is_grad_enabled():
        computed = partial(checkpoint, computed, use_reentrant=False, preserve_rng_state=False)
    outputs = [
        computed(expert, hidden_states, tokens)
        for expert, tokens in enumerate((order // chosen).split(counts))
        if len(tokens)
    ]
    weighted = torch.cat(outputs) * top_k_weights.flatten()[order, None]
    return weighted[order.argsort()].unflatten(0, top_k_index.shape).sum(1)


def _computed(
    inside: Inside, experts: _Weights, expert: int, hidden_states: Tensor, tokens: Tensor
) -> Tensor:
    """An expert's output (chosen, hidden) of those of the tokens that go to it."""
    values = experts.entered(expert, hidden_states[tokens])
    own = inside.places.get(expert)
    return experts.left(expert, values if own is None else inside.read(own, values))


@dataclass(frozen=True)
class _Weights:
    """The experts' first and second weights and biases, one of each, and what is between them."""

    activation: Callable[[Tensor], Tensor]
    count: int
    first: Make
    second: Make
    first_bias: Make | None
    second_bias: Make | None
    transposed: bool

    @classmethod
    def of(cls, module: nn.Module, inside: Inside) -> _Weights:
        first = "gate_up_proj" if module.has_gate else "up_proj"
        return cls(
            getattr(module, "_apply_gate" if module.has_gate else "act_fn"),
            len(getattr(module, first)),
            inside.of(module, first),
            inside.of(module, "down_proj"),
            inside.of(module, f"{first}_bias") if module.has_bias else None,
            inside.of(module, "down_proj_bias") if module.has_bias else None,
            bool(module.is_transposed),
        )

    def entered(self, expert: int, values: Tensor) -> Tensor:
        """What an expert's second matrix reads, (tokens, width), of what its first does."""
        bias = None if self.first_bias is None else self.first_bias(expert)
        return self.activation(self._product(values, self.first(expert), bias))

    def left(self, expert: int, values: Tensor) -> Tensor:
        """An expert's output (tokens, hidden)."""
        bias = None if self.second_bias is None else self.second_bias(expert)
        return self._product(values, self.second(expert), bias)

    def _product(self, values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear(values, weight.t() if self.transposed else weight, bias)
