"""Hunyuan, dense: LLaMA whose q and k are normalised after RoPE: no q-k site."""

from lrquant.architectures import Architecture, decoder

ARCHITECTURE = Architecture(
    name="hunyuan_v1_dense",
    model_types=("hunyuan_v1_dense",),
    blocks="model.layers",
    matrices=decoder.matrices,
    sites=decoder.sites_without_query_key,
    assumes=decoder.WHOLE_ROTARY,
)
