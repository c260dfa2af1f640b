"""AWQ: 4-bit weights, by row or in groups of 32, 64 or 128, that vLLM and gptqmodel load.

Scales are float16, whatever the model's dtype, and a float32 model is written in float16
throughout, as its readers compute in half precision.  Scales learned in float16, and those learned
in bfloat16 from 2^-17 up, keep every bit; those of a float32 model are rounded to 11 bits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from torch import Tensor

from lrquant.blocks.frozen import FrozenBlock, QuantizedMatrix
from lrquant.config.scheme import FLOAT_BITS, Scheme
from lrquant.config.schemes import Schemes
from lrquant.files.whole import JsonObject
from lrquant.formats.format import Format
from lrquant.formats.loading import AS_LEARNED, Loading
from lrquant.formats.parts import Part
from lrquant.formats.runtimes import four_bits_on_cpu, in_vllm_cpu

BITS = 4
GROUP_SIZES = (32, 64, 128)
IN_A_WORD = 32 // BITS
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column, of eight, that each 4 bits of a word hold


def _refusal(schemes: Schemes) -> str | None:
    """Why the format can't hold a model, with the nearest that it can."""
    quantized = [scheme for scheme in schemes.of_language.every if not scheme.floating_point]
    scheme = quantized[0] if quantized else schemes.default
    size = scheme.group_size
    nearest = min(GROUP_SIZES, key=lambda other: abs(math.log2(other / size))) if size else None
    wanted = Scheme(BITS, FLOAT_BITS, nearest, scheme.symmetric)
    if wanted.name != scheme.name:
        return (
            f"{scheme.describe()}: the nearest that it holds is --scheme {wanted.name}, to be "
            "asked for before learning"
        )
    if schemes.tower is not None and schemes.tower != scheme:
        return (
            f"--vision-scheme {schemes.tower.name}: it holds one scheme for the whole model; "
            f"leave the tower in floating point, or give it {scheme.name} too"
        )
    odd = [p for p, other in schemes.patterns if other != scheme and not other.floating_point]
    if odd:
        return (
            f"--scheme-for {odd[0]}: it holds one scheme for the whole model, and matrices that "
            f"are left alone; use --scheme-for '{odd[0]}={scheme.name}', or W16A16 there"
        )
    return None


def _shape_refusal(rows: int, columns: int) -> str | None:
    """Why a weight (out, in) = (rows, columns) can't be packed."""
    if rows % IN_A_WORD:
        return f"{rows} output rows do not fill words of {IN_A_WORD}; use --format dequantized"
    return None


def _dtype(model: torch.dtype) -> torch.dtype:
    return torch.float16 if model == torch.float32 else model


def _quantization_config(parts: Sequence[Part], outside: list[str]) -> JsonObject:
    scheme = parts[0].scheme
    return {
        "quant_method": "awq",
        "bits": BITS,
        "group_size": scheme.group_size or -1,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": [*outside, *_alone(parts)],
    }


def _alone(parts: Sequence[Part]) -> list[str]:
    """Linears inside the blocks that stay as they are."""
    pairs = [pair for part in parts for pair in part.linears.items()]
    return [name for name, scheme in pairs if scheme.floating_point]


def _tensors(frozen: FrozenBlock, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = {name: tensor.to(dtype) for name, tensor in frozen.others.items()}
    for name, matrix in frozen.joined().matrices.items():
        tensors |= {f"{name}.{key}": tensor for key, tensor in _packed(matrix, dtype).items()}
    return tensors


def _packed(linear: QuantizedMatrix, dtype: torch.dtype) -> dict[str, Tensor]:
    """One linear under the format's names, all with the inputs first: (in or groups, out)."""
    offset = 1 << (BITS - 1) if linear.grid.symmetric else 0
    packed = {
        "qweight": _words(linear.codes.to(torch.int16) + offset),
        "qzeros": _words(linear.zero_point.to(torch.int16) + offset),
        "scales": linear.scale.T.to(torch.float16),
    }
    if linear.bias is not None:
        packed["bias"] = linear.bias.to(dtype)
    return packed


def _decode(tensors: dict[str, Tensor], block: str, quantization: JsonObject) -> dict[str, Tensor]:
    bits = quantization["bits"]
    dense = dict(tensors)
    for linear in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
        codes, zeros = (
            _columns(dense.pop(f"{linear}.{key}"), bits) for key in ("qweight", "qzeros")
        )
        scales = dense.pop(f"{linear}.scales").float()
        rows = codes.shape[0] // scales.shape[0]
        weight = (codes - zeros.repeat_interleave(rows, 0)) * scales.repeat_interleave(rows, 0)
        dense[f"{linear}.weight"] = weight.T
    return dense


def _columns(words: Tensor, bits: int) -> Tensor:
    """Codes (n, out) of words (n, out / 8)."""
    shifts = torch.arange(0, 32, bits)
    codes = (words[..., None] >> shifts) & ((1 << bits) - 1)
    columns = torch.empty_like(codes)
    columns[..., ORDER] = codes
    return columns.flatten(1)


def _words(codes: Tensor) -> Tensor:
    """Unsigned codes (out, n) as int32 (n, out / 8), the format's order in the library's words."""
    columns = codes.T.reshape(codes.shape[1], -1, IN_A_WORD)[..., ORDER].flatten(1)
    return pack_to_int32((columns - (1 << (BITS - 1))).to(torch.int8), BITS)


def _loading(scheme: Scheme, target: str) -> Loading:
    """vLLM 0.32 computes in float16 or bfloat16 (source); gptqmodel 7.7 in float16 (tried)."""
    if target == "vllm":
        note = f"vLLM's CPU build computes {four_bits_on_cpu()}"
        return Loading(notes=(_IN_BFLOAT16, note))
    if target == "vllm-cpu":
        packed = in_vllm_cpu(dataclasses.replace(scheme, weight_bits=BITS))
        return dataclasses.replace(packed, notes=(_IN_BFLOAT16,))
    if target == "transformers":
        notes = ("transformers loads AWQ with gptqmodel installed, which computes in float16",)
        return Loading(notes=notes, computes=_BY_ROW if scheme.group_size is None else AS_LEARNED)
    return Loading("made for other runtimes; use --target vllm")


_BY_ROW = (
    "what was learned, but on CPUs nothing: there gptqmodel takes no scale of a row of over 256 "
    "columns"
)
_IN_BFLOAT16 = (
    "AWQ's scales are float16: where vLLM computes in bfloat16 those of a model learned in another "
    "dtype are rounded to 8 bits"
)


FORMAT = Format(
    name="awq",
    refusal=_refusal,
    tensors=_tensors,
    decode=_decode,
    quantization_config=_quantization_config,
    loading=_loading,
    shape_refusal=_shape_refusal,
    dtype=_dtype,
)
