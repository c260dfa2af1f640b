"""A plain checkpoint: dense weights that went through the grid, for software without quantizers.

Activation quantization is not part of it, nor is the clipping of what it spans: with 16-bit
activations it computes what was learned, else only the weights do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lrquant.blocks.frozen import FrozenBlock
from lrquant.config.scheme import FLOAT_BITS, Scheme
from lrquant.formats.format import HADAMARD, Format
from lrquant.formats.loading import Loading


def _tensors(frozen: FrozenBlock, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) for name, tensor in frozen.dense().items()}


def _loading(scheme: Scheme, target: str) -> Loading:
    if target == "native":
        return Loading("dense weights need no runtime of this package; use --target transformers")
    if not (scheme.activation_bits == scheme.attention_bits == FLOAT_BITS):
        return Loading(
            "dense weights bring no quantizers of activations, Q, K and V along, so they would not "
            "compute what is learned"
        )
    return Loading(notes=("dense weights take the space and time of the original model",))


FORMAT = Format(
    name="dequantized",
    refusal=lambda schemes: None,
    tensors=_tensors,
    quantization_config=lambda parts, outside: None,
    loading=_loading,
    holds=frozenset({"input factor", "input clip", "dense factor", HADAMARD}),
    grids=frozenset(),
    experts=lambda schemes, own: None,
)
