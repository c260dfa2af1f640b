"""OLMo Hybrid: gated DeltaNets after a norm, and attention whose norms come after the sublayers."""

from __future__ import annotations

from transformers import PretrainedConfig

from lrquant.architectures import Architecture, decoder, delta_net
from lrquant.architectures.delta_net import MIXER, is_linear, of_mixer
from lrquant.architectures.matrix import Matrix, linears
from lrquant.architectures.mixture import mlp_matrices
from lrquant.architectures.sites import Site, gated_norm_site, norm_site

_INPUTS, _SMALL = ("q_proj", "k_proj", "v_proj", "g_proj"), ("a_proj", "b_proj")


def _matrices(config: PretrainedConfig, block: int) -> tuple[Matrix, ...]:
    if not is_linear(config, block):
        return decoder.matrices(config, block)
    return *linears(*of_mixer(*_INPUTS, "o_proj")), *mlp_matrices(config, None)


def _sites(config: PretrainedConfig, block: int) -> tuple[Site, ...]:
    if not is_linear(config, block):
        return decoder.sites_without_norms(config, block)
    heads, head_dim = config.linear_num_value_heads, config.linear_value_head_dim
    return (
        norm_site("input_layernorm", of_mixer(*_INPUTS, *_SMALL), config.hidden_size),
        gated_norm_site(f"{MIXER}.o_norm", f"{MIXER}.o_proj", head_dim, heads),
        *decoder.mlp_sites(config, "post_attention_layernorm"),
    )


def _kept(config: PretrainedConfig, block: int) -> tuple[str, ...]:
    return delta_net.kept(config, block, _SMALL)


ARCHITECTURE = Architecture(
    name="olmo_hybrid",
    model_types=("olmo_hybrid",),
    blocks="model.layers",
    matrices=_matrices,
    sites=_sites,
    kept=_kept,
    cumulative=True,
)
