"""Shared shape of latent attention: q, and keys with values, out of low ranks (DeepSeek-V2, V3).

A head of q has channels that RoPE does not turn and, after them, such that it does; the keys of the
latter are one head's for all.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from lrquant.architectures.matrix import Matrix, linears
from lrquant.architectures.sites import UNTOUCHED, Fold, Site, norm_site

_KV_A, _KV_B = "self_attn.kv_a_proj_with_mqa", "self_attn.kv_b_proj"
_OUTPUT = "self_attn.o_proj"


def latent_matrices(config: PretrainedConfig, block: int) -> tuple[Matrix, ...]:
    """q of its low rank or whole, keys and values of theirs, and o."""
    queries = ["self_attn.q_proj"]
    if config.q_lora_rank is not None:
        queries = ["self_attn.q_a_proj", "self_attn.q_b_proj"]
    return linears(*queries, _KV_A, _KV_B, _OUTPUT)


def latent_sites(config: PretrainedConfig, block: int) -> tuple[Site, ...]:
    """Three norms, values to output, q with k: channels that turn apart from those that do not."""
    own = config.q_lora_rank is not None
    first = "self_attn.q_a_proj" if own else "self_attn.q_proj"
    queries = "self_attn.q_b_proj" if own else first
    ranks = [norm_site("self_attn.kv_a_layernorm", (_KV_B,), config.kv_lora_rank)]
    if own:
        ranks.append(norm_site("self_attn.q_a_layernorm", (queries,), config.q_lora_rank))
    return (
        norm_site("input_layernorm", (first, _KV_A), config.hidden_size),
        *ranks,
        _value_output(config),
        _still(config, queries),
        _turning(config, queries),
    )


def _value_output(config: PretrainedConfig) -> Site:
    """The rows of each head's values, after those of its key, to the columns of o."""
    heads, width = config.num_attention_heads, config.v_head_dim
    before = (UNTOUCHED,) * config.qk_nope_head_dim
    rows: tuple[int, ...] = ()
    for head in range(heads):
        rows += (*before, *range(head * width, (head + 1) * width))
    size = heads * width
    folds = (Fold(_KV_B, "rows", -1, rows), Fold(_OUTPUT, "columns", 1, tuple(range(size))))
    return Site(_OUTPUT, "value_output", size, folds, _OUTPUT, shiftable=True)


def _still(config: PretrainedConfig, queries: str) -> Site:
    """Channels of q and k that RoPE does not turn: each head's are its own."""
    width, heads = config.qk_nope_head_dim, config.num_attention_heads
    turning, values = (UNTOUCHED,) * config.qk_rope_head_dim, (UNTOUCHED,) * config.v_head_dim
    of_query: tuple[int, ...] = ()
    of_key: tuple[int, ...] = ()
    for head in range(heads):
        own = tuple(range(head * width, (head + 1) * width))
        of_query, of_key = (*of_query, *own, *turning), (*of_key, *own, *values)
    folds = (Fold(queries, "rows", -1, of_query), Fold(_KV_B, "rows", 1, of_key))
    return Site(f"{queries}:{_KV_B}", "query_key", heads * width, folds, None, shiftable=False)


def _turning(config: PretrainedConfig, queries: str) -> Site:
    """Channels that it turns in pairs: one set for all heads, as there is one key."""
    width, half = config.qk_rope_head_dim, config.qk_rope_head_dim // 2
    neighbours = getattr(config, "rope_interleave", True)
    pair = tuple(channel // 2 if neighbours else channel % half for channel in range(width))
    of_query = ((UNTOUCHED,) * config.qk_nope_head_dim + pair) * config.num_attention_heads
    of_key = (UNTOUCHED,) * config.kv_lora_rank + pair
    folds = (Fold(queries, "rows", -1, of_query), Fold(_KV_A, "rows", 1, of_key))
    return Site(f"{queries}:{_KV_A}", "query_key", half, folds, None, shiftable=False)
