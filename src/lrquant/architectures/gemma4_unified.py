"""Gemma 4 Unified: Gemma 4's blocks, and pictures and sound that no tower reads, but linears."""

from lrquant.architectures.multimodal import multimodal

ARCHITECTURE = multimodal(
    name="gemma4_unified",
    model_types=("gemma4_unified",),
    blocks="model.language_model.layers",
    tower="model.embed_vision",
    hands_on="shared_kv_states",
)
