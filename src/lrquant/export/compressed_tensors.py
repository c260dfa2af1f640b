"""compressed-tensors: packed integers that transformers and vLLM load.

Weights of 2 to 8 bits, symmetric or not, by row or group; activations as they are, or symmetric,
dynamic, one scale a token.  Codes are packed by the library itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
)
from torch import Tensor

from lrquant.blocks.frozen import FrozenBlock, QuantizedLinear
from lrquant.config.config import Config
from lrquant.config.scheme import FLOAT_BITS, Scheme
from lrquant.errors import LRQuantError
from lrquant.export.format import Format, factor_refusal
from lrquant.export.loading import Loading
from lrquant.export.parts import Part
from lrquant.export.runtimes import in_transformers, in_vllm, in_vllm_cpu
from lrquant.numerics.integer import centred
from lrquant.numerics.packing import packed_weight

_SCALE = ".weight_scale"


def _refusal(config: Config) -> str | None:
    """Why the format can't hold a run, with the nearest that it can."""
    scheme = config.quantization
    if scheme.weight_bits == FLOAT_BITS:
        return "weights of 16 bits are not packed; use --format dequantized"
    reason = factor_refusal(config) or _two_schemes(config)
    if reason is not None:
        return reason
    wanted = _nearest(scheme)
    if wanted != scheme:
        symmetric = " --activation_symmetric" if wanted.activation_symmetric else ""
        return (
            f"{scheme.describe()}: the nearest that it holds is --scheme {wanted.name}{symmetric}, "
            "to be asked for before learning"
        )
    return None


def _two_schemes(config: Config) -> str | None:
    """What transformers 5.23 loads of two schemes: symmetric weights, and a tower of bytes.

    It decodes weights with zero points by one scheme for the whole model, and prepares some towers
    through weights that packed linears do not have.
    """
    language, tower = config.quantization, config.vision_quantization
    if tower is None:
        return None
    if tower == language:
        if language.activation_bits == FLOAT_BITS or _layout(language) == "int-quantized":
            return None
        return (
            f"--vision-scheme {tower.name}: transformers loads no tower of packed weights with "
            "quantised activations; use a tower of W8A8-sym-qkv16, or --format lrquant"
        )
    decoded = language.activation_bits == FLOAT_BITS and not language.symmetric
    if not decoded and _layout(tower) == "int-quantized":
        return None
    return (
        f"--vision-scheme {tower.name} beside {language.name}: transformers loads two schemes only "
        "where weights are symmetric and the tower's of 8 bits with 8-bit activations; use such as "
        "--scheme W4A16-sym --vision-scheme W8A8-sym-qkv16 --activation_symmetric, give both parts "
        "one scheme, or use --format lrquant"
    )


def _nearest(scheme: Scheme) -> Scheme:
    if scheme.activation_bits == FLOAT_BITS:
        return replace(scheme, qkv_bits=scheme.qkv_bits and FLOAT_BITS)
    bits = 8 if scheme.activation_bits > 4 else 4
    weights = 8 if scheme.weight_bits > 4 else 4
    return Scheme(weights, bits, None if weights == 8 else scheme.group_size, True, True, 16)


def _loading(scheme: Scheme, target: str) -> Loading:
    if target == "native":
        return Loading("made for other runtimes; use --target vllm or transformers")
    takers = {"vllm": in_vllm, "vllm-cpu": in_vllm_cpu, "transformers": in_transformers}
    return takers[target](scheme)


def _layout(scheme: Scheme) -> str:
    """Explicit always: left to itself the library stores 4-bit codes as bytes."""
    eight = scheme.weight_bits == 8 and scheme.activation_bits == 8
    return "int-quantized" if eight else "pack-quantized"


def _quantization_config(parts: Sequence[Part], outside: list[str]) -> dict[str, Any]:
    """One group of linears a part; names are more exact than the class, so they come first."""
    alike = all(part.scheme == parts[0].scheme for part in parts)
    groups = {
        f"group_{number}": _group(part.scheme, _targets(part, number))
        for number, part in enumerate(parts[:1] if alike else parts)
    }
    layouts = {_layout(part.scheme) for part in parts}
    whole = QuantizationConfig(
        config_groups=groups,
        format=layouts.pop() if len(layouts) == 1 else "mixed-precision",
        ignore=outside,
        quantization_status="compressed",
    )
    values = _without_nothing(whole.model_dump(mode="json"))
    packed = parts[0].scheme.activation_bits == FLOAT_BITS
    if packed and (not parts[0].scheme.symmetric or (alike and len(parts) > 1)):
        # Unless it decodes while loading, transformers makes room for zero points that are not
        # packed (compressed-tensors 0.20 leaves them out of what it packs on the meta device) and
        # refuses ours for their shape, and initialises some towers through weights that packed
        # linears do not have; other readers do not look at this key.
        values["dequantize"] = True
    return values


def _targets(part: Part, number: int) -> list[str]:
    """Every linear for the language part; of others, those in their blocks."""
    if number == 0:
        return ["Linear"]
    tower, blocks = part.blocks.removeprefix("model.").split(".", 1)
    return [f"re:.*{re.escape(tower)}\\..*{re.escape(blocks)}\\.[0-9]+\\..*"]


def _group(scheme: Scheme, targets: list[str]) -> QuantizationScheme:
    activations = None
    if scheme.activation_bits != FLOAT_BITS:
        activations = QuantizationArgs(
            num_bits=scheme.activation_bits, symmetric=True, strategy="token", dynamic=True
        )
    weights = QuantizationArgs(
        num_bits=scheme.weight_bits,
        symmetric=scheme.symmetric,
        strategy="group" if scheme.group_size else "channel",
        group_size=scheme.group_size,
    )
    return QuantizationScheme(
        targets=targets, weights=weights, input_activations=activations, format=_layout(scheme)
    )


def _without_nothing(value: Any) -> Any:
    """Leave out keys without a value: readers refuse keys that are newer than they are."""
    if isinstance(value, dict):
        return {key: _without_nothing(part) for key, part in value.items() if part is not None}
    return value


def _tensors(frozen: FrozenBlock, scheme: Scheme, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = {name: tensor.to(dtype) for name, tensor in frozen.others.items()}
    for name, linear in frozen.linears.items():
        parts = packed_linear(linear, _layout(scheme), dtype)
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    return tensors


def packed_linear(linear: QuantizedLinear, layout: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """One linear under the library's names; its codes are signed: code and zero - 2^(b-1)."""
    codes = centred(linear.codes.to(torch.int16), linear.bits, linear.symmetric)
    packed = {"weight_scale": linear.scale.to(dtype)}
    if linear.bias is not None:
        packed["bias"] = linear.bias.to(dtype)
    if layout == "int-quantized":
        return packed | {"weight": codes}
    zero_points = None if linear.symmetric else centred(linear.zero_point, linear.bits, False)
    return packed | packed_weight(codes, zero_points, linear.bits)


def _decode(
    tensors: dict[str, Tensor], block: str, quantization: dict[str, Any]
) -> dict[str, Tensor]:
    """The library's own decompression, with scales in float32."""
    fields = QuantizationConfig.model_fields
    read = QuantizationConfig.model_validate({k: v for k, v in quantization.items() if k in fields})
    dense = dict(tensors)
    for linear in [n.removesuffix(_SCALE) for n in tensors if n.endswith(_SCALE)]:
        packed = [n for n in dense if n.startswith(f"{linear}.weight")]
        parts = {name.removeprefix(linear + "."): dense.pop(name) for name in packed}
        parts["weight_scale"] = parts["weight_scale"].float()
        scheme = _group_of(f"{block}.{linear}", read)
        compressor = BaseCompressor.get_value_from_registry(scheme.format or read.format)
        dense[f"{linear}.weight"] = compressor.decompress(parts, scheme)["weight"]
    return dense


def _group_of(linear: str, read: QuantizationConfig) -> QuantizationScheme:
    """The group that a linear of this full name is of: a name goes before the class."""
    groups = [group for group in read.config_groups.values() if not isinstance(group, list)]
    named = [g for g in groups if any(re.match(t.removeprefix("re:"), linear) for t in g.targets)]
    whole = [g for g in groups if "Linear" in g.targets]
    if not (named or whole):
        raise LRQuantError(f"{linear}: in no group of the quantization_config; export it again")
    return (named or whole)[0]


FORMAT = Format(
    name="compressed-tensors",
    refusal=_refusal,
    tensors=_tensors,
    decode=_decode,
    quantization_config=_quantization_config,
    loading=_loading,
)
