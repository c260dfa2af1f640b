"""LFM2: short convolutions under two gates, with attention in some blocks, experts in later ones.

A convolution's projection in gives b, c and x, of which ``c * conv(b * x)`` is projected out: c
stands to that as up does to down in a gated MLP.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from lrquant.architectures import Architecture, decoder
from lrquant.architectures.matrix import Matrix, fused_linear, linear, linears
from lrquant.architectures.mixture import Mixture
from lrquant.architectures.sites import Site, norm_site, up_down_site, value_output_site

_INPUT, _OUTPUT = "conv.in_proj", "conv.out_proj"
_MLP, _SPARSE = "feed_forward", "lfm2_moe"
_GATE, _UP, _DOWN = (f"{_MLP}.{name}" for name in ("w1", "w3", "w2"))
_ATTENDED = "self_attn.out_proj"


def _is_convolution(config: PretrainedConfig, block: int) -> bool:
    return bool(config.layer_types[block] == "conv")


def _mixture(config: PretrainedConfig, block: int) -> Mixture | None:
    if config.model_type != _SPARSE or block < config.num_dense_layers:
        return None
    names = ("w1", "w3", "w2")
    return Mixture(config.num_experts, config.moe_intermediate_size, _MLP, names=names)


def _mlp_width(config: PretrainedConfig) -> int:
    if config.model_type == _SPARSE or not config.block_auto_adjust_ff_dim:
        return int(config.intermediate_size)
    width, multiple = int(2 * config.intermediate_size / 3), config.block_multiple_of
    if config.block_ffn_dim_multiplier is None:
        return width
    return -(-int(config.block_ffn_dim_multiplier * width) // multiple) * int(multiple)


def _matrices(config: PretrainedConfig, block: int) -> tuple[Matrix, ...]:
    own = _mixture(config, block)
    mlp = own.matrices(config.hidden_size) if own else linears(_GATE, _UP, _DOWN)
    if not _is_convolution(config, block):
        return *linears(*decoder.ATTENTION_INPUTS, _ATTENDED), *mlp
    rows = dict.fromkeys("bcx", config.hidden_size)
    return *fused_linear(_INPUT, **rows), linear(_OUTPUT), *mlp


def _kept(config: PretrainedConfig, block: int) -> tuple[str, ...]:
    own = _mixture(config, block)
    convolution = ("conv.conv.weight",) if _is_convolution(config, block) else ()
    return *convolution, *(own.kept_weights if own else ())


def _sites(config: PretrainedConfig, block: int) -> tuple[Site, ...]:
    own, mixer = _mixture(config, block), _mixer_sites(config, block)
    if own is not None:
        return *mixer, own.norm_site("ffn_norm", config.hidden_size), *own.inner_sites
    return (
        *mixer,
        norm_site("ffn_norm", (_GATE, _UP), config.hidden_size),
        up_down_site(_UP, _DOWN, _mlp_width(config)),
    )


def _mixer_sites(config: PretrainedConfig, block: int) -> tuple[Site, ...]:
    hidden_size = config.hidden_size
    if _is_convolution(config, block):
        readers = tuple(f"{_INPUT}.{part}" for part in "bcx")
        return (
            norm_site("operator_norm", readers, hidden_size, measured=_INPUT),
            up_down_site(f"{_INPUT}.c", _OUTPUT, hidden_size),
        )
    shape = decoder.head_shape(config)
    return (
        norm_site("operator_norm", decoder.ATTENTION_INPUTS, hidden_size),
        value_output_site("self_attn.v_proj", _ATTENDED, *shape),
    )


ARCHITECTURE = Architecture(
    name="lfm2",
    model_types=("lfm2", "lfm2_moe"),
    blocks="model.layers",
    matrices=_matrices,
    sites=_sites,
    kept=_kept,
)
