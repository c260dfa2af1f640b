"""What a checkpoint must hold: zeros of a model's shapes, packed by the format itself."""

from __future__ import annotations

import torch
from torch import Tensor

from lrquant.blocks.frozen import FrozenBlock, QuantizedLinear
from lrquant.blocks.view import BlockView
from lrquant.config.config import Config
from lrquant.config.scheme import FLOAT_BITS
from lrquant.export.format import Format


def expected_block(
    view: BlockView, config: Config, form: Format, dtype: torch.dtype
) -> dict[str, Tensor]:
    """A block's tensors by name, relative to the block, on the meta device.

    `view` gives the shapes; linears are packed one at a time.  Raises LRQuantError where the
    format refuses a shape.
    """
    quantized = view.linears if config.wbits != FLOAT_BITS else ()
    others = {n: t for n, t in view.stored.items() if n.rpartition(".")[0] not in quantized}
    tensors = form.tensors(FrozenBlock({}, others), config.quantization, dtype)
    for linear in quantized:
        frozen = FrozenBlock({linear: _zeros(view, linear, config)}, {})
        packed = form.tensors(frozen, config.quantization, dtype)
        tensors |= {name: part.to("meta") for name, part in packed.items()}
    return tensors


def bits_per_weight(tensors: dict[str, Tensor], view: BlockView) -> float:
    """Bits of all that the linears' weights take, scales, zero points and shapes counted."""
    parts = [
        tensor.nbytes
        for name, tensor in tensors.items()
        if name.rpartition(".")[0] in view.linears and not name.endswith(".bias")
    ]
    weights = sum(view.stored[f"{linear}.weight"].numel() for linear in view.linears)
    return 8 * sum(parts) / weights


def _zeros(view: BlockView, linear: str, config: Config) -> QuantizedLinear:
    """A linear of a block's shapes whose codes are 0."""
    weight, bias = view.stored[f"{linear}.weight"], view.stored.get(f"{linear}.bias")
    scheme, size = config.quantization, view.group_size(linear)
    rows, columns = weight.shape
    rank = config.rotate_rank if config.rotation_sharing == "weight" else 0
    own_input = config.rotation and config.rotation_sharing == "linear"
    return QuantizedLinear(
        codes=torch.zeros((rows, columns), dtype=torch.int8 if scheme.symmetric else torch.uint8),
        scale=torch.ones((rows, columns // size)),
        zero_point=torch.zeros((rows, columns // size)),
        bias=None if bias is None else torch.zeros(rows),
        bits=scheme.weight_bits,
        group_size=size,
        symmetric=scheme.symmetric,
        factor=(torch.ones((rows, rank)), torch.ones((rank, columns))) if rank else None,
        input_factor=torch.ones(columns) if own_input else None,
    )
