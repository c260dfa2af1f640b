"""Qwen3: q and k are normalised per head after projection, so there is no q-k site."""

from lrquant.architectures import Architecture, decoder

ARCHITECTURE = Architecture(
    name="qwen3",
    model_types=("qwen3",),
    blocks="model.layers",
    matrices=decoder.matrices,
    sites=decoder.sites_without_query_key,
    assumes=decoder.WHOLE_ROTARY,
    language_types=("qwen3_vl_text",),
    windows_begin="stream",
)
