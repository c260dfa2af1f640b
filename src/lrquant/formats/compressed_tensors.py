"""compressed-tensors: packed integers that transformers and vLLM load.

Weights of 2 to 8 bits, symmetric or not, by row or group; activations as they are, or symmetric,
dynamic, one scale a token or a group of its channels; inputs times Hadamard matrices, for vLLM.
Codes are packed by the library itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence, Set
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

from lrquant.blocks.frozen import FrozenBlock, QuantizedMatrix
from lrquant.config.scheme import FLOAT_BITS, Scheme
from lrquant.config.schemes import Schemes
from lrquant.errors import LRQuantError
from lrquant.files.whole import JsonObject
from lrquant.formats.format import HADAMARD, Format
from lrquant.formats.loading import Loading
from lrquant.formats.parts import Part
from lrquant.formats.runtimes import in_transformers, in_vllm, in_vllm_cpu
from lrquant.formats.transforms import (
    KEY,
    fits,
    multiplied_back,
    transform_config,
    transforms_of,
)
from lrquant.numerics.grids.integer import IntegerGrid
from lrquant.numerics.packing import packed_weight
from lrquant.numerics.products import centred

_SCALE = ".weight_scale"


def _refusal(schemes: Schemes) -> str | None:
    """Why the format can't hold a model, with the nearest that it can."""
    quantized = [scheme for scheme in schemes.every if not scheme.floating_point]
    if not quantized or any(not scheme.quantizes_weights for scheme in quantized):
        return "weights of 16 bits are not packed"
    together = _mixed_refusal(schemes, quantized) or _tower_refusal(schemes)
    if together is not None:
        return together
    for scheme in quantized:
        wanted = _nearest(scheme)
        if wanted != scheme:
            symmetric = " --activation_symmetric" if wanted.activation_symmetric else ""
            of_tower = scheme == schemes.tower != schemes.default
            flag = f"--vision-scheme {wanted.name}" if of_tower else f"--scheme {wanted.name}"
            start = f"--vision-scheme {scheme.name}: " if of_tower else ""
            named = [pattern for pattern, own in schemes.patterns if own == scheme]
            if scheme != schemes.default and named:
                flag = " ".join(f"--scheme-for '{each}={wanted.name}'" for each in named)
                start = f"--scheme-for {named[0]}: "
            return (
                f"{start}{scheme.describe()}: the nearest that it holds is {flag}{symmetric}, to "
                "be asked for before learning"
            )
    return None


def _mixed_refusal(schemes: Schemes, quantized: Sequence[Scheme]) -> str | None:
    """What transformers 5.23 loads of several schemes: weights without zero points.

    It decodes weights with zero points by one scheme for the whole model.
    """
    several = {_stored(scheme) for _, scheme in schemes.patterns if not scheme.floating_point}
    several |= {_stored(schemes.default)} if not schemes.default.floating_point else set()
    odd = [s for s in quantized if s.activation_bits == FLOAT_BITS and not s.symmetric]
    if len(several) < 2 or not odd:
        return None
    wanted = replace(odd[0], symmetric=True)
    return (
        f"{odd[0].name} beside other schemes: transformers decodes weights with zero points by one "
        f"scheme for the whole model; use symmetric weights, such as {wanted.name}, in all of "
        "them, or --format lrquant"
    )


def _tower_refusal(schemes: Schemes) -> str | None:
    """What transformers 5.23 loads beside a tower: symmetric weights, and a tower of bytes.

    It prepares some towers through weights that packed linears do not have.
    """
    if schemes.tower is None:
        return None
    language, tower = _stored(schemes.default), _stored(schemes.tower)
    others = {_stored(s) for _, s in schemes.patterns if not s.floating_point} - {language}
    if tower == language and others and language.activation_bits == FLOAT_BITS:
        return (
            f"--vision-scheme {tower.name} beside --scheme-for: transformers decodes a tower of "
            "packed weights by one scheme for the whole model; leave the tower in floating point, "
            "give it W8A8-sym-qkv16, or use --format lrquant"
        )
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
        return replace(scheme, qkv_bits=scheme.qkv_bits and FLOAT_BITS, qk_hadamard=False)
    bits = 8 if scheme.activation_bits > 4 else 4
    weights = 8 if scheme.weight_bits > 4 else 4
    group_size = None if weights == 8 else scheme.group_size
    across = None if weights == bits == 8 else scheme.activation_group_size
    kind = scheme.weight_grid
    return Scheme(weights, bits, group_size, True, True, 16, kind, across, scheme.hadamard)


def _stored(scheme: Scheme) -> Scheme:
    """The scheme without what transform_config says of it: how weights and inputs are packed."""
    return replace(scheme, hadamard=False)


def _experts(schemes: Schemes, own: Set[Scheme]) -> str | None:
    """What transformers 5.23 joins of single experts: symmetric weights of one scheme, decoded."""
    rotated = next((scheme for scheme in own if scheme.hadamard), None)
    if rotated is not None:
        plain = replace(
            rotated, symmetric=True, activation_bits=FLOAT_BITS, qkv_bits=None, hadamard=False
        )
        return (
            f"{rotated.name}: no runtime multiplies what experts read by Hadamard matrices; give "
            f"experts {plain.name} and all else {replace(plain, hadamard=True).name}, to be asked "
            "for before learning, or use --format lrquant"
        )
    quantized = {_stored(scheme) for scheme in schemes.every if not scheme.floating_point}
    first = _stored(schemes.default)
    alike = quantized == {first} and len(own) == 1
    if alike and first.symmetric and first.activation_bits == FLOAT_BITS:
        return None
    wanted = replace(
        schemes.default,
        symmetric=True,
        activation_bits=FLOAT_BITS,
        qkv_bits=None,
        qk_hadamard=False,
    )
    return (
        "transformers joins experts of symmetric weights with 16-bit activations in one scheme "
        f"alone; use --scheme {wanted.name}, to be asked for before learning, or --format lrquant"
    )


def _loading(scheme: Scheme, target: str) -> Loading:
    if target == "native":
        return Loading("made for other runtimes; use --target vllm or transformers")
    takers = {"vllm": in_vllm, "vllm-cpu": in_vllm_cpu, "transformers": in_transformers}
    return takers[target](scheme)


def _layout(scheme: Scheme) -> str:
    """Explicit always: left to itself the library stores 4-bit codes as bytes."""
    eight = scheme.weight_bits == 8 and scheme.activation_bits == 8
    return "int-quantized" if eight else "pack-quantized"


def _quantization_config(parts: Sequence[Part], outside: list[str]) -> JsonObject:
    """One group of linears a scheme; the class comes last, or readers warn of names after it."""
    transforms = transform_config(parts, outside)
    parts = [
        replace(part, linears={name: _stored(own) for name, own in part.linears.items()})
        for part in parts
    ]
    first = parts[0].scheme
    alike = all(part.scheme == first and not part.mixed for part in parts)
    groups, alone = [], []
    for number, part in enumerate(parts):
        for scheme, names in part.groups.items():
            if scheme.floating_point:
                alone += names
            elif number and not part.mixed and not alike:
                groups.append(_group(scheme, [_blocks_pattern(part)]))
            elif scheme != first:
                groups.append(_group(scheme, names))
    groups.append(_group(first, ["Linear"]))
    layouts = {group.format for group in groups}
    whole = QuantizationConfig(
        config_groups={f"group_{number}": group for number, group in enumerate(groups)},
        format=str(groups[0].format) if len(layouts) == 1 else "mixed-precision",
        ignore=[*outside, *alone],
        quantization_status="compressed",
    )
    values = _without_nothing(whole.model_dump(mode="json"))
    packed = first.activation_bits == FLOAT_BITS
    joined = any(re.search(r"\.experts\.[0-9]+\.", name) for name in parts[0].linears)
    if packed and (not first.symmetric or (alike and len(parts) > 1) or joined):
        # Unless it decodes while loading, transformers makes room for zero points that are not
        # packed (compressed-tensors 0.20 leaves them out of what it packs on the meta device) and
        # refuses ours for their shape, and initialises some towers through weights that packed
        # linears do not have, and joins single experts only of what it decodes; other readers do
        # not look at this key.
        values["dequantize"] = True
    return values if transforms is None else {**values, KEY: transforms}


def _blocks_pattern(part: Part) -> str:
    """Every linear of a tower's blocks, whatever a version of transformers calls the tower."""
    tower, blocks = part.blocks.removeprefix("model.").split(".", 1)
    return f"re:.*{re.escape(tower)}\\..*{re.escape(blocks)}\\.[0-9]+\\..*"


def _group(scheme: Scheme, targets: list[str]) -> QuantizationScheme:
    activations = None
    if scheme.activation_bits != FLOAT_BITS:
        activations = QuantizationArgs(
            num_bits=scheme.activation_bits,
            symmetric=True,
            strategy="group" if scheme.activation_group_size else "token",
            group_size=scheme.activation_group_size,
            dynamic=True,
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
        return {key: _without_nothing(own) for key, own in value.items() if own is not None}
    return value


def _tensors(frozen: FrozenBlock, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = {name: tensor.to(dtype) for name, tensor in frozen.others.items()}
    for name, matrix in frozen.joined().matrices.items():
        packed = packed_matrix(matrix, _layout(matrix.scheme), dtype)
        tensors |= {f"{name}.{key}": tensor for key, tensor in packed.items()}
    return tensors


def packed_matrix(matrix: QuantizedMatrix, layout: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """One linear under the library's names; its codes are signed: code and zero - 2^(b-1)."""
    grid = integer_grid(matrix)
    codes = centred(matrix.codes.to(torch.int16), grid)
    packed = {"weight_scale": matrix.scale.to(dtype)}
    if matrix.bias is not None:
        packed["bias"] = matrix.bias.to(dtype)
    if layout == "int-quantized":
        return packed | {"weight": codes}
    zero_points = None if grid.symmetric else centred(matrix.zero_point, grid)
    return packed | packed_weight(codes, zero_points, grid.bits)


def integer_grid(matrix: QuantizedMatrix) -> IntegerGrid:
    """The grid of a matrix of integers; LRQuantError for another kind."""
    if not isinstance(matrix.grid, IntegerGrid):
        raise LRQuantError(
            f"grid {matrix.grid.kind!r}: holds no integers; use --format dequantized"
        )
    return matrix.grid


def _decode(tensors: dict[str, Tensor], block: str, quantization: JsonObject) -> dict[str, Tensor]:
    """The library's own decompression, with scales in float32; ValueError for a wrong shape."""
    fields = QuantizationConfig.model_fields
    read = QuantizationConfig.model_validate({k: v for k, v in quantization.items() if k in fields})
    transforms = transforms_of(quantization)
    dense = dict(tensors)
    for linear in [n.removesuffix(_SCALE) for n in tensors if n.endswith(_SCALE)]:
        packed = [n for n in dense if n.startswith(f"{linear}.weight")]
        own = {name.removeprefix(linear + "."): dense.pop(name) for name in packed}
        own["weight_scale"] = own["weight_scale"].float()
        scheme = _group_of(f"{block}.{linear}", read)
        compressor = BaseCompressor.get_value_from_registry(scheme.format or read.format)
        shape = own["weight_shape"].tolist() if "weight_shape" in own else None
        weight = compressor.decompress(own, scheme)["weight"]
        if shape not in (None, list(weight.shape)):
            raise ValueError(f"{linear}.weight_shape is {shape} beside {list(weight.shape)}")
        dense[f"{linear}.weight"] = multiplied_back(weight, f"{block}.{linear}", transforms)
    return dense


def _group_of(linear: str, read: QuantizationConfig) -> QuantizationScheme:
    """The group that a linear of this full name is of: a name goes before the class."""
    groups = [group for group in read.config_groups.values() if not isinstance(group, list)]
    named = [g for g in groups if any(fits(target, linear) for target in g.targets)]
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
    experts=_experts,
    holds=frozenset({HADAMARD}),
)
