"""Shared shape of pre-norm vision transformers: LayerNorms, attention to all patches."""

from __future__ import annotations

from dataclasses import dataclass

from lrquant.architectures.matrix import Matrix, linears
from lrquant.architectures.sites import Site, norm_site, query_key_site, value_output_site


@dataclass(frozen=True)
class Names:
    """What a block calls its modules; `qkv` is one linear or three."""

    attention_norm: str
    qkv: tuple[str, ...]
    output: str
    mlp_norm: str
    mlp_inputs: tuple[str, ...]
    mlp_output: str

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """Every linear of a block."""
        return linears(*self.qkv, self.output, *self.mlp_inputs, self.mlp_output)

    def sites(self, hidden_size: int, heads: int, rotary: str | None = None) -> tuple[Site, ...]:
        """Norm, value-output and query-key sites; GELU stands between the linears of the MLP."""
        head_dim = hidden_size // heads
        fused = len(self.qkv) == 1
        query, key, value = self.qkv * 3 if fused else self.qkv
        before_values = 2 * hidden_size if fused else 0
        return (
            norm_site(self.attention_norm, self.qkv, hidden_size),
            norm_site(self.mlp_norm, self.mlp_inputs, hidden_size),
            value_output_site(value, self.output, heads, heads, head_dim, before_values),
            query_key_site(query, key, heads, heads, head_dim, rotary),
        )
