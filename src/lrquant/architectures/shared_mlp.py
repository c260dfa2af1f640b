"""Shared shape of Granite's MLPs: gate and up in one linear, for every token, beside experts.

Either may be missing.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from lrquant.architectures.matrix import Matrix, fused_linear, linear
from lrquant.architectures.mixture import Mixture
from lrquant.architectures.sites import Site, norm_site, up_down_site

_GATE_UP, _DOWN = "shared_mlp.input_linear", "shared_mlp.output_linear"


def mixture(config: PretrainedConfig) -> Mixture | None:
    """The experts of every block, if there are any."""
    count, width = config.num_local_experts, config.intermediate_size
    return Mixture(count, width, path="block_sparse_moe", router="router") if count else None


def _width(config: PretrainedConfig) -> int:
    return int(getattr(config, "shared_intermediate_size", 0))


def matrices(config: PretrainedConfig) -> tuple[Matrix, ...]:
    """Those of what every token goes through, and of the experts."""
    own, width = mixture(config), _width(config)
    shared = (*fused_linear(_GATE_UP, gate=width, up=width), linear(_DOWN)) if width else ()
    return *shared, *(own.matrices(config.hidden_size) if own else ())


def kept(config: PretrainedConfig) -> tuple[str, ...]:
    """The router's weight."""
    own = mixture(config)
    return own.kept_weights if own else ()


def sites(config: PretrainedConfig) -> tuple[Site, ...]:
    """The norm that both read, and one within each MLP."""
    own, width, norm = mixture(config), _width(config), "post_attention_layernorm"
    if not width:
        assert own is not None
        return own.norm_site(norm, config.hidden_size), *own.inner_sites
    up = f"{_GATE_UP}.up"
    readers = (f"{_GATE_UP}.gate", up, *(own.readers if own else ()))
    return (
        norm_site(norm, readers, config.hidden_size, measured=_GATE_UP),
        up_down_site(up, _DOWN, width),
        *(own.inner_sites if own else ()),
    )
