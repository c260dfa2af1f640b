"""compressed-tensors' transform_config: which linears read their inputs times Hadamard matrices.

It says the part that is done at run time alone; weights are stored as they then are.  Linears are
named by patterns over all blocks, from the name of the list of blocks on: what stands before that
differs between runtimes, and vLLM maps no names here.  Of the matrices, Sylvester's, no tensors are
stored: the libraries make them by size.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from compressed_tensors.transform import TransformArgs, TransformConfig, TransformScheme
from torch import Tensor

from lrquant.files.whole import JsonObject
from lrquant.formats.parts import Part
from lrquant.numerics.hadamard import hadamard

KEY = "transform_config"


def transform_config(parts: Sequence[Part], outside: Iterable[str]) -> JsonObject | None:
    """The value of `KEY` in quantization_config, one group a size of matrices; None without any.

    `outside` are the names of linears that are in none of the parts.
    """
    places: dict[int, list[TransformArgs]] = {}
    for part in parts:
        others = [*outside, *(n for other in parts if other is not part for n in other.linears)]
        for size in sorted(set(part.hadamard_sizes.values())):
            targets = _patterns(part, size, "" if part is parts[0] else f"{_top(part)}\\..*")
            odd = [name for name in others if any(fits(target, name) for target in targets)]
            ignore = sorted({_apart(name, part) for name in odd})
            where = {"targets": targets, "location": "input"} | ({"ignore": ignore} if odd else {})
            places.setdefault(size, []).append(TransformArgs.model_validate(where))
    if not places:
        return None
    config = TransformConfig(
        config_groups={
            f"hadamard_{size}": TransformScheme(type="hadamard", apply=own, head_dim=size)
            for size, own in sorted(places.items())
        }
    )
    # Readers refuse keys that are newer than they are.
    return config.model_dump(mode="json", exclude_unset=True)


def transforms_of(quantization: JsonObject) -> TransformConfig:
    """What a quantization_config says of transforms, which may be nothing; ValueError if odd."""
    return TransformConfig.model_validate(quantization.get(KEY) or {"config_groups": {}})


def multiplied_back(weight: Tensor, linear: str, config: TransformConfig) -> Tensor:
    """A float32 weight (out, in), as stored, of what the linear of this full name reads."""
    for scheme in config.config_groups.values():
        for where in scheme.apply:
            meant = any(fits(target, linear) for target in where.targets)
            if meant and not any(fits(name, linear) for name in where.ignore):
                size = scheme.head_dim or weight.shape[1]
                weight = hadamard(weight.unflatten(1, (-1, size))).flatten(1)
    return weight


def fits(target: str, linear: str) -> bool:
    """Whether a target is this linear's name, or a pattern that it fits."""
    pattern = target.removeprefix("re:")
    return target == linear or (pattern != target and re.match(pattern, linear) is not None)


def _patterns(part: Part, size: int, start: str) -> list[str]:
    """Those that the linears of a part with matrices of a size fit, each over its blocks."""
    blocks: dict[str, list[str]] = {}
    everywhere: dict[str, set[str]] = {}
    for name in part.linears:
        index, _, module = name.removeprefix(f"{part.blocks}.").partition(".")
        everywhere.setdefault(module, set()).add(index)
        if part.hadamard_sizes.get(name) == size:
            blocks.setdefault(module, []).append(index)
    path = re.escape(part.blocks.rpartition(".")[2])
    patterns = []
    for module, indices in blocks.items():
        which = "[0-9]+" if everywhere[module] == set(indices) else f"({'|'.join(indices)})"
        patterns.append(f"re:.*{start}{path}\\.{which}\\.{re.escape(module)}$")
    return patterns


def _apart(name: str, part: Part) -> str:
    """What says that a linear is not of a part: all of its own, by whatever path, or its name."""
    top = name.removeprefix("model.").partition(".")[0]
    return name if top == _top(part) else f"re:.*{re.escape(top)}\\..*"


def _top(part: Part) -> str:
    """The module that a part lies in, which runtimes name alike."""
    return part.blocks.removeprefix("model.").partition(".")[0]
