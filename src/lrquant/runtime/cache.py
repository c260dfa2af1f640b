"""A key-value cache that keeps the codes of K and V instead of their values."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

from lrquant.blocks.attention import mark_quantized
from lrquant.config.scheme import Scheme
from lrquant.errors import LRQuantError
from lrquant.numerics.grids.integer import IntegerGrid
from lrquant.numerics.grids.schemes import attention_grid
from lrquant.numerics.hadamard import hadamard
from lrquant.numerics.tokens import encode_tokens

_SCALE_BYTES = 4


class QuantizedCache(Cache):
    """Cache for `generate(past_key_values=...)` of a native checkpoint with quantised K and V.

    `config` is the loaded model's.  Per token and head it holds one code a channel, two in a byte
    up to 4 bits, a float32 scale and a zero point; what attention reads of it equals, bit for bit,
    what it would quantise itself.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        quantization = getattr(config, "quantization_config", None)
        values = getattr(quantization, "scheme", None)
        scheme = Scheme(**values) if values else None
        grid = None if scheme is None else attention_grid(scheme)
        if scheme is None or grid is None or getattr(quantization, "others", None):
            raise LRQuantError(
                "QuantizedCache: this model's K and V are not quantised; leave past_key_values out"
            )
        layers = range(config.num_hidden_layers)
        self._records = [_Layer(grid, scheme.qk_hadamard) for _ in layers]
        super().__init__(layers=[*self._records])

    @property
    def nbytes(self) -> int:
        """Bytes that the cached tokens take."""
        return sum(
            states.nbytes
            for layer in self._records
            for states in (layer.keys, layer.values)
            if states is not None
        )


class _Layer(DynamicLayer):
    """Records uint8 (batch, heads, tokens, bytes) of codes, scale and zero point, in that order.

    Codes and zero points are counted from the smallest code.
    Those of keys may be of keys times a Hadamard matrix.
    """

    def __init__(self, grid: IntegerGrid, rotated: bool = False) -> None:
        super().__init__()
        self._grid, self._bits, self._rotated = grid, grid.bits, rotated

    def update(
        self, key_states: Tensor, value_states: Tensor, *arguments: object, **named: object
    ) -> tuple[Tensor, Tensor]:
        """Encode the new states (batch, heads, tokens, head_dim); return all of them, decoded."""
        rotated = hadamard(key_states) if self._rotated else key_states
        if rotated.shape == value_states.shape:
            new = self._encode(torch.stack((rotated, value_states))).unbind()
        else:
            new = self._encode(rotated), self._encode(value_states)
        keys, values = super().update(*new)
        keys = self._decode(keys, key_states.shape[-1])
        return mark_quantized(keys), mark_quantized(self._decode(values, value_states.shape[-1]))

    def _encode(self, states: Tensor) -> Tensor:
        flat = states.reshape(-1, states.shape[-1])
        codes, (scale, zero_point) = encode_tokens(flat, self._grid)
        smallest = self._grid.code_range[0]
        if smallest:
            codes, zero_point = codes.sub_(smallest), zero_point - smallest
        codes = codes.to(torch.uint8)
        if self._bits <= 4:
            codes = pad(codes, (0, 1)) if codes.shape[1] % 2 else codes
            first, second = codes.chunk(2, 1)
            codes = first | (second << 4)
        fields = codes, scale.view(torch.uint8), zero_point.to(torch.uint8)
        return torch.cat(fields, 1).view(*states.shape[:-1], -1)

    def _decode(self, records: Tensor, head_dim: int) -> Tensor:
        """Records to values, float32 (batch, heads, tokens, head_dim)."""
        width = records.shape[-1] - _SCALE_BYTES - 1
        codes, scale, zero_point = records.split((width, _SCALE_BYTES, 1), -1)
        if self._bits <= 4:
            codes = codes.contiguous()
            codes = torch.cat((codes & 15, codes >> 4), -1)
            codes = codes if codes.shape[-1] == head_dim else codes[..., :head_dim]
        values = codes.float().sub_(zero_point)
        aligned = scale.clone(memory_format=torch.contiguous_format)
        return values.mul_(aligned.view(torch.float32))
