"""lrquant: the native format, for all that is learned and that no other format holds.

Asymmetric activations of any bits, quantised Q, K and V, shifts after norms, input factors of
linears.  Weights are packed as compressed-tensors packs them; `lrquant.runtime` computes with them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lrquant.blocks.frozen import FrozenBlock
from lrquant.blocks.runner import INPUT_FACTOR_SUFFIX, SHIFT_SUFFIX
from lrquant.config.config import Config
from lrquant.config.scheme import Scheme
from lrquant.export.compressed_tensors import packed_linear
from lrquant.export.format import Format
from lrquant.export.loading import Loading
from lrquant.export.parts import Part
from lrquant.runtime.linear import IntegerLinear
from lrquant.runtime.loading import NAME, VERSION

_PACKED = ".weight_packed"


def _refusal(config: Config) -> str | None:
    """Only the dense factor, which no integer product can carry, is left out."""
    if config.rotation and config.rotation_sharing == "weight":
        return (
            "--rotation_sharing weight multiplies the decoded weight, which no integer product "
            "can carry; learn with --rotation_sharing site or linear"
        )
    return None


def _tensors(frozen: FrozenBlock, scheme: Scheme, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = {
        name: tensor.float() if name.endswith(SHIFT_SUFFIX) else tensor.to(dtype)
        for name, tensor in frozen.others.items()
    }
    for name, linear in frozen.linears.items():
        parts = packed_linear(linear, "pack-quantized", dtype)
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        if linear.input_factor is not None:
            tensors[name + INPUT_FACTOR_SUFFIX] = linear.input_factor
    return tensors


def _decode(
    tensors: dict[str, Tensor], block: str, quantization: dict[str, Any]
) -> dict[str, Tensor]:
    """By the runtime's own linear."""
    tower = quantization.get("tower")
    part = tower if tower and block.startswith(tower["blocks"] + ".") else quantization
    scheme = Scheme(**part["scheme"])
    dense = dict(tensors)
    for linear in [n.removesuffix(_PACKED) for n in tensors if n.endswith(_PACKED)]:
        packed = [n for n in dense if n.startswith(f"{linear}.weight")]
        parts = {name.removeprefix(linear + "."): dense.pop(name) for name in packed}
        rows, columns = parts["weight_shape"].tolist()
        module = IntegerLinear(columns, rows, scheme, bias=False, input_factor=False)
        module.load_state_dict(parts)
        module.unpack()
        dense[f"{linear}.weight"] = module.weight(torch.float32)
    return dense


def _quantization_config(parts: Sequence[Part], outside: list[str]) -> dict[str, Any]:
    language, *towers = map(_part_config, parts)
    values = {"quant_method": NAME, "format_version": VERSION, **language, "ignore": outside}
    if towers:
        values["tower"] = {"blocks": parts[1].blocks, **towers[0]}
    return values


def _part_config(part: Part) -> dict[str, Any]:
    def modules(suffix: str) -> list[str]:
        return [name.removesuffix(suffix) for name in part.names if name.endswith(suffix)]

    return {
        "scheme": dataclasses.asdict(part.scheme),
        "biases": modules(".bias"),
        "shifts": modules(SHIFT_SUFFIX),
        "input_factors": modules(INPUT_FACTOR_SUFFIX),
    }


def _loading(scheme: Scheme, target: str) -> Loading:
    if target == "native":
        return Loading()
    return Loading(f"{target} alone does not know this package's format; use --target native")


FORMAT = Format(
    name=NAME,
    refusal=_refusal,
    tensors=_tensors,
    decode=_decode,
    quantization_config=_quantization_config,
    loading=_loading,
    shifts=True,
)
