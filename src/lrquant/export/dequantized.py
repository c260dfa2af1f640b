"""A plain checkpoint: dense weights that went through the grid, for software without quantizers.

Activation quantization is not part of it: with 16-bit activations it computes what was learned,
else only the weights do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lrquant.export import Format
from lrquant.learn.frozen import FrozenBlock
from lrquant.scheme import Scheme


def _tensors(frozen: FrozenBlock, scheme: Scheme, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) for name, tensor in frozen.dense().items()}


FORMAT = Format(
    name="dequantized",
    refusal=lambda config: None,
    tensors=_tensors,
    quantization_config=lambda scheme, outside, names: None,
)
