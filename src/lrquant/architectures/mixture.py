"""Shared shape of decoders whose MLPs are mixtures of experts, in all blocks or in some."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PretrainedConfig

from lrquant.architectures import decoder
from lrquant.architectures.architecture import Architecture
from lrquant.architectures.matrix import Matrix, linears, parts_of_experts
from lrquant.architectures.sites import (
    Site,
    chain_site,
    norm_site,
    query_key_site,
    up_down_site,
    value_output_site,
)

NAMES = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Mixture:
    """One block's experts: how many of what width, and the names of what stands beside them.

    `path` is that of the module, empty for the block itself, in which `router` and `shared` are
    named: the module that has the router's weight, None where it reads another tensor than the
    experts, and an MLP of `shared_width` that every token goes through; `shared_gate` is a linear
    that weighs its output, `kept` are further parameters that stay in floating point.  `names` are
    those of an expert's gate, up and down, or of up and down, where one is published on its own.
    Down reads what up gives to a `power`.  Experts read and give `latent` channels where there are
    two linears for it: `entrance` gives them of what the router reads, `exit` takes their sum.
    `transposed` says that inputs come first in the experts' parameters.
    """

    count: int
    width: int
    path: str = "mlp"
    router: str | None = "gate"
    names: tuple[str, ...] = NAMES
    shared: str | None = None
    shared_width: int = 0
    shared_gate: str | None = None
    kept: tuple[str, ...] = ()
    power: Literal[1, 2] = 1
    latent: int | None = None
    entrance: str = ""
    exit: str = ""
    transposed: bool = False

    def _at(self, *names: str) -> tuple[str, ...]:
        return tuple(f"{self.path}.{name}" if self.path else name for name in names)

    @property
    def _experts(self) -> str:
        return self._at("experts")[0]

    def _inputs(self, index: int) -> list[str]:
        """What an expert's input is multiplied with."""
        return [f"{self._experts}.{index}.{name}" for name in self.names[:-1]]

    @property
    def _shared(self) -> tuple[str, ...]:
        """Linears of the shared one, by the names that they have nearly everywhere."""
        if self.shared is None:
            return ()
        return self._at(*(f"{self.shared}.{name}" for name in NAMES[-len(self.names) :]))

    @property
    def _around(self) -> tuple[str, ...]:
        """The linears into the experts' channels and out of them."""
        return () if self.latent is None else self._at(self.entrance, self.exit)

    def matrices(self, hidden_size: int) -> tuple[Matrix, ...]:
        """Gate, up and down of every expert, of the shared one, and what is around them."""
        *inputs, down = self.names
        first, second = dict.fromkeys(inputs, self.width), {down: self.latent or hidden_size}
        module, count, turned = self._experts, self.count, self.transposed
        stored = "gate_up_proj" if len(inputs) > 1 else "up_proj"
        return (
            *parts_of_experts(module, stored, count, first, True, turned),
            *parts_of_experts(module, "down_proj", count, second, False, turned),
            *linears(*self._shared, *self._around),
        )

    @property
    def kept_weights(self) -> tuple[str, ...]:
        """Weights that stay in floating point, the router's first."""
        modules = [name for name in (self.router, self.shared_gate) if name is not None]
        return self._at(*(f"{name}.weight" for name in modules), *self.kept)

    @property
    def readers(self) -> tuple[str, ...]:
        """All that reads what the experts read, or what `entrance` does: the router among it."""
        entrance = self._around[:1]
        own = [name for index in range(self.count) for name in self._inputs(index)]
        others = [name for name in (self.router, self.shared_gate) if name is not None]
        return (*(entrance or own), *self._shared[:-1], *self._at(*others))

    def norm_site(self, norm: str, hidden_size: int, offset: float = 0.0) -> Site:
        """The norm before it, which the router reads as the experts do."""
        measured = None if self.latent is not None else self._experts
        return norm_site(norm, self.readers, hidden_size, offset, measured)

    @property
    def inner_sites(self) -> tuple[Site, ...]:
        """One within each expert, within the shared one, and from `entrance` to the experts."""
        starts = [f"{self._experts}.{index}" for index in range(self.count)]
        *_, up, down = self.names
        own = [
            up_down_site(f"{start}.{up}", f"{start}.{down}", self.width, self.power)
            for start in starts
        ]
        if self.shared is not None:
            *_, up, down = self._shared
            own.append(up_down_site(up, down, self.shared_width, self.power))
        return (*own, *self._entrance_site)

    @property
    def _entrance_site(self) -> tuple[Site, ...]:
        if self.latent is None:
            return ()
        readers = [name for index in range(self.count) for name in self._inputs(index)]
        return (chain_site(self._around[0], readers, self.latent, self._experts),)


def every_few(config: PretrainedConfig, block: int) -> bool:
    """Whether a block of Qwen's has experts: every few do, but for those that are named dense."""
    sparse = config.num_experts > 0 and (block + 1) % config.decoder_sparse_step == 0
    return sparse and block not in config.mlp_only_layers


def beside_a_gated_one(config: PretrainedConfig) -> Mixture:
    """Qwen's experts, and one more that every token goes through, whose output a gate weighs."""
    return Mixture(
        config.num_experts,
        config.moe_intermediate_size,
        shared="shared_expert",
        shared_width=config.shared_expert_intermediate_size,
        shared_gate="shared_expert_gate",
    )


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


def mlp_matrices(config: PretrainedConfig, own: Mixture | None) -> tuple[Matrix, ...]:
    """Those of a block's experts, or of its dense MLP where it has none."""
    dense = linears(*decoder.MLP_INPUTS, "mlp.down_proj")
    return dense if own is None else own.matrices(config.hidden_size)


def mlp_sites(
    config: PretrainedConfig, own: Mixture | None, norm: str | None, norm_offset: float = 0.0
) -> tuple[Site, ...]:
    """Those of its experts or dense MLP, and of the norm before it where there is one."""
    size = config.hidden_size
    if own is not None:
        before = () if norm is None else (own.norm_site(norm, size, norm_offset),)
        return *before, *own.inner_sites
    before = () if norm is None else (norm_site(norm, decoder.MLP_INPUTS, size, norm_offset),)
    return *before, up_down_site("mlp.up_proj", "mlp.down_proj", config.intermediate_size)


def mixture_family(
    name: str,
    mixture: Choice,
    sites: Sites = attention_sites,
    matrices: Callable[[PretrainedConfig, int], tuple[Matrix, ...]] = attention_matrices,
    *,
    model_types: tuple[str, ...] | None = None,
    norm: str | None = "post_attention_layernorm",
    mixer_kept: Callable[[PretrainedConfig, int], tuple[str, ...]] = lambda config, block: (),
    **rest: Any,
) -> Architecture:
    """A family whose block has the experts that `mixture` says, or a dense MLP where that is None.

    `matrices` and `sites` are those of attention, `mixer_kept` what of it stays in floating point;
    `norm` is the one before the MLP, None where it comes after it; what else a declaration says is
    handed on.
    """

    def all_matrices(config: PretrainedConfig, block: int) -> tuple[Matrix, ...]:
        return *matrices(config, block), *mlp_matrices(config, mixture(config, block))

    def all_sites(config: PretrainedConfig, block: int) -> tuple[Site, ...]:
        return *sites(config, block), *mlp_sites(config, mixture(config, block), norm)

    def kept(config: PretrainedConfig, block: int) -> tuple[str, ...]:
        own = mixture(config, block)
        return *mixer_kept(config, block), *(own.kept_weights if own else ())

    return Architecture(
        name=name,
        model_types=model_types or (name,),
        blocks="model.layers",
        matrices=all_matrices,
        sites=all_sites,
        kept=kept,
        **rest,
    )
