"""Gemma 3n, text: four residual streams, keys and values that blocks share, inputs of each block.

A block predicts all of the streams, computes on one and corrects the others by it (AltUp).  Beside
attention stands a linear of low rank that adds what it reads to what it gives (LAuReL): the norm
before them feeds the residual.  Norms after the sublayers do too; q, k and v are normalised; the
gate of some MLPs is cut off at a quantile of its own, which leaves up to down as it is.  Linears
of a few outputs, of the low rank and of what a block gets beside the states stay in floating point.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from lrquant.architectures import Architecture, decoder
from lrquant.architectures.gemma4 import PER_LAYER, attention_readers
from lrquant.architectures.matrix import Matrix, linears
from lrquant.architectures.sites import Site, norm_site, up_down_site

_SMALL = (
    "altup.correction_coefs",
    "altup.prediction_coefs",
    "altup.modality_router",
    "laurel.linear_left",
    "laurel.linear_right",
)


def _matrices(config: PretrainedConfig, block: int) -> tuple[Matrix, ...]:
    mlp = (*decoder.MLP_INPUTS, "mlp.down_proj")
    return linears(*attention_readers(config, block), "self_attn.o_proj", *mlp)


def _sites(config: PretrainedConfig, block: int) -> tuple[Site, ...]:
    return (
        norm_site("pre_feedforward_layernorm", decoder.MLP_INPUTS, config.hidden_size),
        up_down_site("mlp.up_proj", "mlp.down_proj", config.intermediate_size[block]),
    )


ARCHITECTURE = Architecture(
    name="gemma3n",
    model_types=("gemma3n_text",),
    blocks="model.layers",
    matrices=_matrices,
    sites=_sites,
    kept=lambda config, block: (*(f"{name}.weight" for name in _SMALL), *PER_LAYER),
    assumes=decoder.WHOLE_ROTARY,
    hands_on="shared_kv_states",
    residuals=lambda config: config.altup_num_inputs,
    windows_begin="bos",
)
