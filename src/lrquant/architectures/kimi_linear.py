"""Kimi Linear: delta attention, latent attention without RoPE in every fourth block, and experts.

Delta attention normalises q and k and lets v through a convolution and SiLU, so that no scale can
leave them.  What decides how fast its state decays stays in floating point; the gate of its output
is of a low rank.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from lrquant.architectures.latent import latent_matrices, latent_sites
from lrquant.architectures.matrix import Matrix, linears
from lrquant.architectures.mixture import Mixture, mixture_family
from lrquant.architectures.sites import Site, chain_site, gated_norm_site, norm_site

_MIXER = "self_attn"
_INPUTS = tuple(f"{_MIXER}.{name}_proj" for name in ("q", "k", "v", "g_a"))
_GATE, _OUTPUT = f"{_MIXER}.g_b_proj", f"{_MIXER}.o_proj"
_DECAY, _RATE = f"{_MIXER}.forget_gate", f"{_MIXER}.b_proj"
_KEPT = (
    *(f"{_MIXER}.conv1d.weight", f"{_RATE}.weight", f"{_DECAY}.A_log"),
    *(f"{_DECAY}.f_a_proj.weight", f"{_DECAY}.f_b_proj.weight"),
)


def _is_delta(config: PretrainedConfig, block: int) -> bool:
    return bool(config.layer_types[block] == "linear_attention")


def _mixture(config: PretrainedConfig, block: int) -> Mixture | None:
    if config.mlp_layer_types[block] != "sparse":
        return None
    width = config.moe_intermediate_size
    shared = width * config.n_shared_experts
    names = ("w1", "w3", "w2")
    return Mixture(
        config.num_local_experts, width, names=names, shared="shared_experts", shared_width=shared
    )


def _matrices(config: PretrainedConfig, block: int) -> tuple[Matrix, ...]:
    if not _is_delta(config, block):
        return latent_matrices(config, block)
    return linears(*_INPUTS, _GATE, _OUTPUT)


def _sites(config: PretrainedConfig, block: int) -> tuple[Site, ...]:
    if not _is_delta(config, block):
        return latent_sites(config, block)
    heads, head_dim = config.linear_num_heads, config.linear_head_dim
    readers = (*_INPUTS, f"{_DECAY}.f_a_proj", _RATE)
    return (
        norm_site("input_layernorm", readers, config.hidden_size),
        gated_norm_site(f"{_MIXER}.o_norm", _OUTPUT, head_dim, heads),
        chain_site(_INPUTS[-1], (_GATE,), head_dim),
    )


ARCHITECTURE = mixture_family(
    "kimi_linear",
    _mixture,
    _sites,
    _matrices,
    mixer_kept=lambda config, block: _KEPT if _is_delta(config, block) else (),
    cumulative=True,
)
