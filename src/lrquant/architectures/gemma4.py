"""Gemma 4 and Gemma 4 Unified, text: keys and values that blocks share, and inputs of each block.

Norms stand before and after each sublayer, those after it feed the residual; q, k and v are
normalised.  Some blocks attend to the keys and values of an earlier one and have none themselves;
full attention may have values that are its keys.  What a block gets beside the hidden states goes
through two small linears, which stay in floating point.  Experts stand beside the MLP and have a
norm of their own, which their router does not read.  The Unified one has neither of the two.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from lrquant.architectures import Architecture, decoder
from lrquant.architectures.matrix import Matrix, linears
from lrquant.architectures.mixture import Mixture
from lrquant.architectures.sites import Site, norm_site, up_down_site

PER_LAYER = ("per_layer_input_gate.weight", "per_layer_projection.weight")


def attention_readers(config: PretrainedConfig, block: int) -> tuple[str, ...]:
    """The linears of attention that read its norm."""
    query, key, value = decoder.ATTENTION_INPUTS
    if _reuses(config, block):
        return (query,)
    full = config.layer_types[block] != "sliding_attention"
    alike = getattr(config, "attention_k_eq_v", False)
    return (query, key) if alike and full else (query, key, value)


def _reuses(config: PretrainedConfig, block: int) -> bool:
    return bool(block >= config.num_hidden_layers - config.num_kv_shared_layers)


def _matrices(config: PretrainedConfig, block: int) -> tuple[Matrix, ...]:
    own, mlp = _mixture(config), (*decoder.MLP_INPUTS, "mlp.down_proj")
    beside = own.matrices(config.hidden_size) if own else ()
    return *linears(*attention_readers(config, block), "self_attn.o_proj", *mlp), *beside


def _mixture(config: PretrainedConfig) -> Mixture | None:
    if not getattr(config, "enable_moe_block", False):
        return None
    width, kept = config.moe_intermediate_size, ("router.proj.weight",)
    return Mixture(config.num_experts, width, path="", router=None, kept=kept)


def _sites(config: PretrainedConfig, block: int) -> tuple[Site, ...]:
    own, size = _mixture(config), config.hidden_size
    double = config.use_double_wide_mlp and _reuses(config, block)
    return (
        norm_site("input_layernorm", attention_readers(config, block), size),
        norm_site("pre_feedforward_layernorm", decoder.MLP_INPUTS, size),
        up_down_site("mlp.up_proj", "mlp.down_proj", config.intermediate_size * (1 + double)),
        *((own.norm_site("pre_feedforward_layernorm_2", size), *own.inner_sites) if own else ()),
    )


def _kept(config: PretrainedConfig, block: int) -> tuple[str, ...]:
    own = _mixture(config)
    inputs = PER_LAYER if getattr(config, "hidden_size_per_layer_input", 0) else ()
    return *inputs, *(own.kept_weights if own else ())


ARCHITECTURE = Architecture(
    name="gemma4",
    model_types=("gemma4_text", "gemma4_unified_text"),
    blocks="model.layers",
    matrices=_matrices,
    sites=_sites,
    kept=_kept,
    assumes={"use_bidirectional_attention": (None, "vision")},
    hands_on="shared_kv_states",
    windows_begin="bos",
)
