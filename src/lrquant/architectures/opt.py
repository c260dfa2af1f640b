"""OPT: LayerNorm with bias, learned positions, ReLU; also with norms after the sublayer (350m).

With norms after the sublayer the norm's output also feeds the residual, so no scale can leave it:
only the value-output, query-key and fc1-fc2 sites remain.  Norms without an elementwise weight
(Galactica) have nowhere to fold a scale either.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from lrquant.architectures import Architecture
from lrquant.architectures.matrix import Matrix, linears
from lrquant.architectures.sites import (
    Site,
    norm_site,
    query_key_site,
    up_down_site,
    value_output_site,
)

_ATTENTION_INPUTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def _matrices(config: PretrainedConfig, block: int) -> tuple[Matrix, ...]:
    return linears(*_ATTENTION_INPUTS, "self_attn.out_proj", "fc1", "fc2")


def _sites(config: PretrainedConfig, block: int) -> tuple[Site, ...]:
    heads = config.num_attention_heads
    head_dim = config.hidden_size // heads
    q, k, v = _ATTENTION_INPUTS
    sites = [
        value_output_site(v, "self_attn.out_proj", heads, heads, head_dim),
        query_key_site(q, k, heads, heads, head_dim, rotary=None),
    ]
    if config.do_layer_norm_before and config.layer_norm_elementwise_affine:
        sites.insert(0, norm_site("self_attn_layer_norm", _ATTENTION_INPUTS, config.hidden_size))
        sites.insert(1, norm_site("final_layer_norm", ("fc1",), config.hidden_size))
    if config.activation_function == "relu":
        sites.append(up_down_site("fc1", "fc2", config.ffn_dim))
    return tuple(sites)


ARCHITECTURE = Architecture(
    name="opt",
    model_types=("opt",),
    blocks="model.decoder.layers",
    matrices=_matrices,
    sites=_sites,
    windows_begin="stream",
)
