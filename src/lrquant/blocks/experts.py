"""Experts of a block, one after the other, under a name that transformers knows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from lrquant.model.experts import SECOND, ExpertForm, expert_form

NAME = "lrquant"
_INSIDE = "_lrquant_inside"
_FORWARD = "forward"  # of one module, in place of that of its class
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
    """What is done inside a module of experts, of a `name` in its block.

    `places` names what each one's second matrix reads; `read` makes of such values (tokens, width)
    what products take.  `observe` is told of what is read here by a module in rows and, while
    `all_experts`, of what each one would read if every token went to it; `route` of the tokens'
    experts (tokens, chosen).  `apart` are the module's parameters, by their names in it, of which
    each expert's part is made when it computes, and once more for its gradient.
    """

    places: Mapping[int, str]
    read: Read
    observe: Watch | None = None
    route: Callable[[Tensor], None] | None = None
    name: str = ""
    apart: Mapping[str, Apart] = field(default_factory=dict)
    all_experts: bool = True

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
    _forwards: dict[str, object] = field(default_factory=dict)

    @classmethod
    def of(cls, block: nn.Module) -> ExpertModules:
        """All of them."""
        ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
        modules = block.named_modules()
        return cls({name: module for name, module in modules if expert_form(module) is not None})

    @property
    def in_rows(self) -> frozenset[str]:
        """Those that get a row of each token for each expert: all they read is read inside."""
        return frozenset(n for n, module in self.modules.items() if _form(module).in_rows)

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
        in_rows = self.in_rows
        for name, module in self.modules.items():
            setattr(module, _INSIDE, inside[name])
            if name in in_rows:
                self._forwards[name] = vars(module).get(_FORWARD)
                setattr(module, _FORWARD, partial(rows_forward, module))
                continue
            config = getattr(module, "config")  # noqa: B009
            self._before[name] = config._experts_implementation
            config._experts_implementation = NAME

    def leave(self) -> None:
        """Let them compute as they did before."""
        for name, before in reversed(self._before.items()):
            module = self.modules[name]
            getattr(module, "config")._experts_implementation = before  # noqa: B009
        self._before.clear()
        for name, forward in self._forwards.items():
            delattr(self.modules[name], _FORWARD)
            if forward is not None:
                setattr(self.modules[name], _FORWARD, forward)
        self._forwards.clear()
        for module in self.modules.values():
            if _INSIDE in vars(module):
                delattr(module, _INSIDE)


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
    if inside.observe is not None and inside.all_experts:
        for expert, place in inside.places.items():
            inside.observe(place, experts.entered(expert, hidden_states))
    chosen = top_k_index.shape[1]
    order = top_k_index.flatten().argsort(stable=True)
    counts = top_k_index.flatten().bincount(minlength=experts.count).tolist()
    outputs = experts.outputs(inside, hidden_states, (order // chosen).split(counts))
    weighted = outputs * top_k_weights.flatten()[order, None]
    return weighted[order.argsort()].unflatten(0, top_k_index.shape).sum(1)


def rows_forward(module: nn.Module, hidden_states: Tensor) -> Tensor:
    """Output (experts * tokens, hidden) of experts that each get a row of every token, or 0.

    Such a row gives 0: experts without biases leave it out.
    """
    inside: Inside = getattr(module, _INSIDE)
    experts = _Weights.of(module, inside)
    rows = hidden_states.unflatten(0, (experts.count, -1))
    reached = (rows != 0).any(-1)
    if inside.route is not None:
        most = int(reached.sum(0).amax())
        inside.route(reached.int().topk(most, dim=0).indices.t())
    if inside.observe is not None:
        own = rows[reached.int().argmax(0), torch.arange(rows.shape[1], device=rows.device)]
        inside.observe(inside.name, own)
        for expert, place in inside.places.items() if inside.all_experts else ():
            inside.observe(place, experts.entered(expert, inside.read(inside.name, own)))
    which, tokens = reached.nonzero(as_tuple=True)
    values = inside.read(inside.name, rows[which, tokens])
    each = torch.arange(len(values), device=values.device).split(reached.sum(1).tolist())
    outputs = experts.outputs(inside, values, each)
    joined = torch.zeros_like(rows).index_put((which, tokens), outputs.to(rows.dtype))
    return joined.flatten(0, 1)


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
        form = _form(module)
        return cls(
            form.activation,
            len(getattr(module, form.first)),
            inside.of(module, form.first),
            inside.of(module, SECOND),
            inside.of(module, f"{form.first}_bias") if form.biased else None,
            inside.of(module, f"{SECOND}_bias") if form.biased else None,
            form.transposed,
        )

    def outputs(self, inside: Inside, values: Tensor, rows: Sequence[Tensor]) -> Tensor:
        """What all experts give, in their order, of those `rows` of values that each one gets."""
        computed = partial(self._output, inside, values)
        if inside.apart and torch.is_grad_enabled():
            computed = partial(checkpoint, computed, use_reentrant=False, preserve_rng_state=False)
        return torch.cat([computed(expert, own) for expert, own in enumerate(rows) if len(own)])

    def _output(self, inside: Inside, values: Tensor, expert: int, rows: Tensor) -> Tensor:
        inner, place = self.entered(expert, values[rows]), inside.places.get(expert)
        return self.left(expert, inner if place is None else inside.read(place, inner))

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


def _form(module: nn.Module) -> ExpertForm:
    form = expert_form(module)
    assert form is not None
    return form
