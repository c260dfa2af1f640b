"""Shared shape of blocks that mix tokens by a gated DeltaNet or by attention under a gate.

A gated DeltaNet normalises q and k and lets v through a convolution and SiLU, so that no scale can
leave them; its small projections (of the decay and of the rate of writing) and the convolution stay
in floating point.  What attention gives is multiplied by a gate, so that no shift passes it.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PretrainedConfig

from lrquant.architectures import decoder
from lrquant.architectures.matrix import Matrix, linears
from lrquant.architectures.mixture import Mixture, mlp_matrices, mlp_sites
from lrquant.architectures.sites import Site, gated_norm_site, norm_site, value_output_site

MIXER = "linear_attn"
ATTENTION = (*decoder.ATTENTION_INPUTS, "self_attn.o_proj")


def is_linear(config: PretrainedConfig, block: int) -> bool:
    """Whether a block mixes tokens by linear attention."""
    return bool(config.layer_types[block] == "linear_attention")


def matrices(
    config: PretrainedConfig, block: int, inputs: Sequence[str], own: Mixture | None = None
) -> tuple[Matrix, ...]:
    """Those of a block whose DeltaNet reads its norm through `inputs`, with experts if it has."""
    names = (*of_mixer(*inputs), f"{MIXER}.out_proj") if is_linear(config, block) else ATTENTION
    return *linears(*names), *mlp_matrices(config, own)


def kept(
    config: PretrainedConfig, block: int, small: Sequence[str], own: Mixture | None = None
) -> tuple[str, ...]:
    """The convolution and the `small` projections of a block's DeltaNet, and its router."""
    names = of_mixer("conv1d", *small) if is_linear(config, block) else ()
    router = () if own is None else own.kept_weights
    return (*(f"{name}.weight" for name in names), *router)


def sites(
    config: PretrainedConfig,
    block: int,
    inputs: Sequence[str],
    small: Sequence[str],
    own: Mixture | None = None,
) -> tuple[Site, ...]:
    """The sites of a block whose norms multiply with their weight and 1, all but the gated one."""
    return (
        *mixer_sites(config, block, inputs, small),
        *mlp_sites(config, own, "post_attention_layernorm", norm_offset=1.0),
    )


def mixer_sites(
    config: PretrainedConfig, block: int, inputs: Sequence[str], small: Sequence[str]
) -> tuple[Site, ...]:
    """Those of attention or of the DeltaNet, and of the norm before it."""
    norm, hidden_size = "input_layernorm", config.hidden_size
    if is_linear(config, block):
        heads, head_dim = config.linear_num_value_heads, config.linear_value_head_dim
        return (
            norm_site(norm, of_mixer(*inputs, *small), hidden_size, 1.0),
            gated_norm_site(f"{MIXER}.norm", f"{MIXER}.out_proj", head_dim, heads),
        )
    shape = decoder.head_shape(config)
    value, output = "self_attn.v_proj", "self_attn.o_proj"
    return (
        norm_site(norm, decoder.ATTENTION_INPUTS, hidden_size, 1.0),
        value_output_site(value, output, *shape, shiftable=False),
    )


def of_mixer(*names: str) -> tuple[str, ...]:
    """Names within the DeltaNet as the block has them."""
    return tuple(f"{MIXER}.{name}" for name in names)
