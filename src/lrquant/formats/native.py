"""lrquant: the native format, for all that is learned and that no other format holds.

Asymmetric activations of any bits, quantised Q, K and V, shifts after norms, input factors and
clipped inputs of linears.  Weights are packed as compressed-tensors packs them; `lrquant.runtime`
computes with them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence, Set

import torch
from torch import Tensor

from lrquant.blocks.frozen import FrozenBlock
from lrquant.blocks.runner import INPUT_CLIP_SUFFIX, INPUT_FACTOR_SUFFIX, SHIFT_SUFFIX
from lrquant.config.scheme import Scheme
from lrquant.config.schemes import Schemes
from lrquant.files.whole import JsonObject
from lrquant.formats.compressed_tensors import packed_matrix
from lrquant.formats.format import HADAMARD, Format
from lrquant.formats.loading import Loading
from lrquant.formats.parts import Part
from lrquant.numerics.grids.grid import Grid
from lrquant.numerics.grids.schemes import attention_grid
from lrquant.numerics.hadamard import hadamard
from lrquant.runtime.linear import IntegerLinear
from lrquant.runtime.loading import NAME, VERSION, NativeConfig

_PACKED = ".weight_packed"


def _tensors(frozen: FrozenBlock, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = {
        name: tensor.float() if name.endswith(SHIFT_SUFFIX) else tensor.to(dtype)
        for name, tensor in frozen.others.items()
    }
    for name, matrix in frozen.joined().matrices.items():
        packed = packed_matrix(matrix, "pack-quantized", dtype)
        tensors |= {f"{name}.{key}": tensor for key, tensor in packed.items()}
        if matrix.input_factor is not None:
            tensors[name + INPUT_FACTOR_SUFFIX] = matrix.input_factor
        if matrix.input_clip is not None:
            tensors[name + INPUT_CLIP_SUFFIX] = matrix.input_clip.clone()  # linears share it
    return tensors


def _decode(tensors: dict[str, Tensor], block: str, quantization: JsonObject) -> dict[str, Tensor]:
    """By the runtime's own linear."""
    config = NativeConfig(**quantization)
    dense = dict(tensors)
    for linear in [n.removesuffix(_PACKED) for n in tensors if n.endswith(_PACKED)]:
        packed = [n for n in dense if n.startswith(f"{linear}.weight")]
        own = {name.removeprefix(linear + "."): dense.pop(name) for name in packed}
        rows, columns = own["weight_shape"].tolist()
        scheme = config.part_of(f"{block}.{linear}").scheme
        module = IntegerLinear(columns, rows, scheme, bias=False)
        module.load_state_dict(own)
        module.unpack()
        dense[f"{linear}.weight"] = module.weight(torch.float32)
        if scheme.hadamard:
            factor = dense.pop(linear + INPUT_FACTOR_SUFFIX, torch.ones(()))
            dense[f"{linear}.weight"] = hadamard(dense[f"{linear}.weight"] * factor)
    return dense


def _quantization_config(parts: Sequence[Part], outside: list[str]) -> JsonObject:
    language, *towers = map(_part_config, parts)
    groups = [group for part in parts for group in list(part.groups.items())[1:]]
    others = [{"scheme": s.to_dict(), "modules": n} for s, n in groups if not s.floating_point]
    alone = [name for scheme, names in groups if scheme.floating_point for name in names]
    values = {"quant_method": NAME, "format_version": VERSION, **language}
    values["ignore"] = [*outside, *alone]
    if others:
        values["others"] = others
    attentions = [group for part in parts for group in _other_attentions(part)]
    if attentions:
        values["attentions"] = attentions
    experts = _experts(parts[0])
    if experts:
        values["experts"] = experts
    if towers:
        values["tower"] = {"blocks": parts[1].blocks, **towers[0]}
    return values


def _experts(part: Part) -> list[str]:
    """The names of one expert's linears, in their order, where experts are linears of their own."""
    first = [re.search(r"\.experts\.0\.(\w+)$", name) for name in part.linears]
    return list(dict.fromkeys(match[1] for match in first if match is not None))


def _other_attentions(part: Part) -> list[JsonObject]:
    """Attentions whose Q, K and V are not quantised as the part's scheme says."""

    def how(scheme: Scheme) -> tuple[Grid | None, bool]:
        return attention_grid(scheme), scheme.qk_hadamard

    usual, groups = how(part.scheme), dict[Scheme, list[str]]()
    for name, scheme in part.attentions.items():
        if how(scheme) != usual:
            groups.setdefault(scheme, []).append(name)
    return [{"scheme": scheme.to_dict(), "modules": names} for scheme, names in groups.items()]


def _part_config(part: Part) -> JsonObject:
    values: JsonObject = {
        "scheme": part.scheme.to_dict(),
        "biases": _modules(part, ".bias"),
        "shifts": _modules(part, SHIFT_SUFFIX),
        "input_factors": _modules(part, INPUT_FACTOR_SUFFIX),
    }
    clipped = _modules(part, INPUT_CLIP_SUFFIX)
    return {**values, "input_clips": clipped} if clipped else values  # older readers lack it


def _modules(part: Part, suffix: str) -> list[str]:
    """Modules with such a tensor: as named in a block where all blocks have it, else in full."""
    full = [name.removesuffix(suffix) for name in part.names if name.endswith(suffix)]
    start = len(part.blocks) + 1
    by_block: dict[str, list[str]] = {}
    for name in full:
        index, _, module = name[start:].partition(".")
        by_block.setdefault(index, []).append(module)
    blocks = {name[start:].partition(".")[0] for name in part.names}
    alike = len(by_block) == len(blocks) and len({tuple(m) for m in by_block.values()}) == 1
    return next(iter(by_block.values())) if alike else full


def _experts_refusal(schemes: Schemes, own: Set[Scheme]) -> str | None:
    """What the runtime puts in the place of a block's experts: packed linears, or nothing."""
    if all(scheme.quantizes_weights for scheme in own) or all(s.floating_point for s in own):
        return None
    return (
        "experts of 16-bit weights beside others in one block, or with quantised activations, are "
        "not packed; give all of a block's experts weights below 16 bits, or all W16A16"
    )


def _loading(scheme: Scheme, target: str) -> Loading:
    if target == "native":
        return Loading()
    return Loading(f"{target} alone does not know this package's format; use --target native")


FORMAT = Format(
    name=NAME,
    refusal=lambda schemes: None,
    tensors=_tensors,
    decode=_decode,
    quantization_config=_quantization_config,
    loading=_loading,
    experts=_experts_refusal,
    experts_apart=True,
    holds=frozenset({"shift", "input factor", "input clip", HADAMARD}),
)
