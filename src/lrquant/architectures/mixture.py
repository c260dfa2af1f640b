"""Shared shape of decoders whose MLPs are mixtures of experts, in all blocks or in some."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from lrquant.architectures import decoder
from lrquant.architectures.architecture import Architecture
from lrquant.architectures.matrix import Matrix, linears, parts_of_experts
from lrquant.architectures.sites import (
    Site,
    norm_site,
    query_key_site,
    up_down_site,
    value_output_site,
)

NAMES = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Mixture:
    """One block's experts: how many of what width, and the names of what stands beside them.

    `path` is that of the module, in which `router` and `shared` are named: the module that has the
    router's weight, and an MLP of `shared_width` that every token goes through; `shared_gate` is a
    linear that weighs its output, `kept` are further parameters that stay in floating point.
    `names` are those of an expert's gate, up and down where one is published on its own.
    """

    count: int
    width: int
    path: str = "mlp"
    router: str = "gate"
    names: tuple[str, str, str] = NAMES
    shared: str | None = None
    shared_width: int = 0
    shared_gate: str | None = None
    kept: tuple[str, ...] = ()

    @property
    def _experts(self) -> str:
        return f"{self.path}.experts"

    @property
    def _shared(self) -> list[str]:
        return [] if self.shared is None else [f"{self.path}.{self.shared}.{n}" for n in NAMES]

    def matrices(self, hidden_size: int) -> tuple[Matrix, ...]:
        """Gate, up and down of every expert, and of the shared one."""
        gate, up, down = self.names
        first, second = {gate: self.width, up: self.width}, {down: hidden_size}
        module, count = self._experts, self.count
        return (
            *parts_of_experts(module, "gate_up_proj", count, first, reads_input=True),
            *parts_of_experts(module, "down_proj", count, second, reads_input=False),
            *linears(*self._shared),
        )

    @property
    def kept_weights(self) -> tuple[str, ...]:
        """Weights that stay in floating point, the router's first."""
        gate = () if self.shared_gate is None else (f"{self.path}.{self.shared_gate}.weight",)
        own = tuple(f"{self.path}.{name}" for name in self.kept)
        return (f"{self.path}.{self.router}.weight", *gate, *own)

    def norm_site(self, norm: str, hidden_size: int) -> Site:
        """The norm before it, which the router reads as the experts do."""
        readers = [
            f"{self._experts}.{index}.{name}"
            for index in range(self.count)
            for name in self.names[:2]
        ]
        readers += [*self._shared[:2], f"{self.path}.{self.router}"]
        readers += [] if self.shared_gate is None else [f"{self.path}.{self.shared_gate}"]
        return norm_site(norm, tuple(readers), hidden_size, measured=self._experts)

    @property
    def up_down_sites(self) -> tuple[Site, ...]:
        """One within each expert, and within the shared one."""
        starts = [f"{self._experts}.{index}" for index in range(self.count)]
        _, up, down = self.names
        own = [up_down_site(f"{start}.{up}", f"{start}.{down}", self.width) for start in starts]
        if self.shared is None:
            return tuple(own)
        _, up, down = self._shared
        return (*own, up_down_site(up, down, self.shared_width))


Choice = Callable[[PretrainedConfig, int], Mixture | None]
Sites = Callable[[PretrainedConfig, int], tuple[Site, ...]]


def attention_matrices(config: PretrainedConfig, block: int) -> tuple[Matrix, ...]:
    """q, k, v and o."""
    return linears(*decoder.ATTENTION_INPUTS, "self_attn.o_proj")


def attention_sites(config: PretrainedConfig, block: int) -> tuple[Site, ...]:
    """The sites of attention where q and k are normalised after projection."""
    query, key, value = decoder.ATTENTION_INPUTS
    return (
        norm_site("input_layernorm", (query, key, value), config.hidden_size),
        value_output_site(value, "self_attn.o_proj", *decoder.head_shape(config)),
    )


def rotary_attention_sites(rotary: str | None, part: bool = False) -> Sites:
    """Those where they are not, and channels turn as `rotary` says, in a `part` of each head."""

    def sites(config: PretrainedConfig, block: int) -> tuple[Site, ...]:
        query, key, _ = decoder.ATTENTION_INPUTS
        turned = decoder.rotary_dim(config) if part else None
        shape = decoder.head_shape(config)
        return (
            *attention_sites(config, block),
            query_key_site(query, key, *shape, rotary=rotary, rotary_dim=turned),
        )

    return sites


def mixture_family(
    name: str,
    mixture: Choice,
    sites: Sites = attention_sites,
    matrices: Callable[[PretrainedConfig, int], tuple[Matrix, ...]] = attention_matrices,
    *,
    model_types: tuple[str, ...] | None = None,
    norm: str | None = "post_attention_layernorm",
    **rest: Any,
) -> Architecture:
    """A family whose block has the experts that `mixture` says, or a dense MLP where that is None.

    `matrices` and `sites` are those of attention; `norm` is the one before the MLP, None where it
    comes after it; what else a declaration says is handed on.
    """

    def all_matrices(config: PretrainedConfig, block: int) -> tuple[Matrix, ...]:
        own = mixture(config, block)
        dense = linears(*decoder.MLP_INPUTS, "mlp.down_proj")
        return (*matrices(config, block), *(own.matrices(config.hidden_size) if own else dense))

    def all_sites(config: PretrainedConfig, block: int) -> tuple[Site, ...]:
        own, size = mixture(config, block), config.hidden_size
        attention = sites(config, block)
        if own is not None:
            before = () if norm is None else (own.norm_site(norm, size),)
            return (*attention, *before, *own.up_down_sites)
        before = () if norm is None else (norm_site(norm, decoder.MLP_INPUTS, size),)
        dense = up_down_site("mlp.up_proj", "mlp.down_proj", config.intermediate_size)
        return (*attention, *before, dense)

    def kept(config: PretrainedConfig, block: int) -> tuple[str, ...]:
        own = mixture(config, block)
        return () if own is None else own.kept_weights

    return Architecture(
        name=name,
        model_types=model_types or (name,),
        blocks="model.layers",
        matrices=all_matrices,
        sites=all_sites,
        kept=kept,
        **rest,
    )
