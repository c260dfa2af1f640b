"""Stored weights under the names of the model they are for: complete, and of its shapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from weakref import WeakValueDictionary

from torch import Tensor
from transformers import PreTrainedModel

from lrquant.errors import LRQuantError
from lrquant.model.sources.checks import AGAIN, is_listed, unfinished_download
from lrquant.model.sources.conversion import Conversion, Join
from lrquant.model.sources.files import (
    INDEX,
    SAFETENSORS,
    TORCH,
    SafetensorsSource,
    TorchFileSource,
)
from lrquant.model.sources.gguf_file import GGUFSource
from lrquant.model.sources.kinds import kind_of_weights
from lrquant.model.sources.mxfp4 import MXFP4Source
from lrquant.model.sources.protocol import WeightSource
from lrquant.model.sources.resolve import ModelFiles

FLOATING = ("float16", "bfloat16", "float32", "float64")
_PACKED = (
    *(".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".scales", ".qzeros"),
    *(".SCB", ".absmax", ".quant_state.bitsandbytes__nf4", ".weight_q", ".weight_zero_point"),
)


def open_source(files: ModelFiles, skeleton: PreTrainedModel) -> WeightSource:
    """The weights under the skeleton's names, complete and of its shapes.

    `skeleton` is the model with its parameters on the meta device.
    """
    folder = files.folder
    stored: WeightSource
    if files.gguf_file is not None:
        stored = GGUFSource(folder / files.gguf_file, skeleton)
    elif is_listed(folder / SAFETENSORS) or is_listed(folder / f"{SAFETENSORS}{INDEX}"):
        stored = MXFP4Source(SafetensorsSource(folder))
    elif is_listed(folder / TORCH) or is_listed(folder / f"{TORCH}{INDEX}"):
        stored = TorchFileSource(folder)
    else:
        raise LRQuantError(
            f"{folder}: no weights: neither {SAFETENSORS} nor {TORCH}, nor an index of shards"
            f"{unfinished_download(folder)}; {_instead(folder)}"
        )
    return SkeletonSource(stored, skeleton)


def _instead(folder: Path) -> str:
    kind = kind_of_weights(folder)
    return AGAIN if kind is None else f"it holds {kind}"


class SkeletonSource(WeightSource):
    """Stored weights under a skeleton's names, with or without the base model's prefix in the file.

    What transformers joins on loading, as the tensors of single experts, is joined when it is read.
    A tied weight that is not stored comes from its partner.  Raises LRQuantError if a parameter or
    persistent buffer is missing or has another shape.
    """

    def __init__(self, stored: WeightSource, skeleton: PreTrainedModel) -> None:
        self.origin = stored.origin
        self._stored = stored
        wanted = skeleton.state_dict()
        shapes = {name: tuple(t.shape) for name, t in wanted.items()}
        conversion, prefix = Conversion(skeleton), skeleton.base_model_prefix + "."
        renamed = _renamed(stored.names(), conversion)
        matched = _match_names(renamed, shapes, prefix)
        self._names = {name: renamed[other] for name, other in matched.items()}
        lacking = [name for name in shapes if name not in self._names]
        self._joins = _joins(conversion, stored, lacking, prefix)
        parts = {part for join, _, _ in self._joins.values() for part in join.names}
        self._extra = stored.names() - parts - frozenset(self._names.values())
        # One object for tied weights: two copies of an unpacked embedding would cost gigabytes.
        self._shared: WeakValueDictionary[str, Tensor] = WeakValueDictionary()
        tied: Mapping[str, str] = skeleton.get_expanded_tied_weights_keys(all_submodels=True)
        for pair in tied.items():
            for absent, present in (pair, pair[::-1]):
                if absent not in self._names and present in self._names:
                    self._names[absent] = self._names[present]
        self._check(shapes)
        require_floating_weights(self, wanted)

    def _check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        missing = [name for name in shapes if name not in self.names()]
        if missing:
            packed = [name for name in sorted(self._extra) if name.endswith(_PACKED)]
            advice = f"the weights do not belong to config.json, or {AGAIN}"
            if packed:
                advice = (
                    f"it holds {packed[0]}, so it is already quantised: start from the "
                    "floating-point model"
                )
            raise LRQuantError(
                f"{self.origin}: {len(missing)} of the model's {len(shapes)} tensors are missing "
                f"(first: {missing[0]}); {advice}"
            )
        wrong = [name for name in shapes if self.shape(name) != shapes[name]]
        if wrong:
            raise LRQuantError(
                f"{self.origin}: {len(wrong)} of the model's {len(shapes)} tensors have a wrong "
                f"shape (first: {wrong[0]} is {list(self.shape(wrong[0]))}, config.json says "
                f"{list(shapes[wrong[0]])}); the weights do not belong to config.json"
            )

    def names(self) -> frozenset[str]:
        return frozenset(self._names) | self._joins.keys()

    def extra_names(self) -> frozenset[str]:
        return self._extra

    def dtype(self, name: str) -> str:
        if name in self._joins:
            kinds = {self._stored.dtype(part) for part in sorted(self._joins[name][0].names)}
            return next((kind for kind in sorted(kinds) if kind not in FLOATING), min(kinds))
        return self._stored.dtype(self._stored_name(name))

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self._joins:
            return self._joins[name][2]
        return self._stored.shape(self._stored_name(name))

    def tensor(self, name: str) -> Tensor:
        if name in self._joins:
            join, made, _ = self._joins[name]
            return join.of(self._stored.tensor)[made]
        stored = self._stored_name(name)
        tensor = self._shared.get(stored)
        if tensor is None:
            tensor = self._shared[stored] = self._stored.tensor(stored)
        return tensor

    def read_ahead(self, names: Iterable[str]) -> None:
        names = set(names)
        parts = set().union(*(self._joins[name][0].names for name in names & self._joins.keys()))
        own = {self._stored_name(name) for name in names - self._joins.keys()}
        self._stored.read_ahead(sorted(parts | own))

    def unpacked_from(self) -> str:
        return self._stored.unpacked_from()

    def alike(self, name: str, other: str) -> bool:
        if name in self._joins or other in self._joins:
            return super().alike(name, other)
        return self._stored_name(name) == self._stored_name(other) or super().alike(name, other)

    def fingerprint(self) -> str:
        return self._stored.fingerprint()

    def _stored_name(self, name: str) -> str:
        if name in self._names:
            return self._names[name]
        if name in self._extra:
            return name
        raise LRQuantError(f"{self.origin}: holds no tensor {name!r}; see names()")


def require_floating_weights(source: WeightSource, wanted: Mapping[str, Tensor]) -> None:
    """Refuse float8 and integers where a model computes with floating-point numbers.

    Casting them would leave out the scales that belong to them.
    """
    odd = [
        name
        for name, tensor in wanted.items()
        if tensor.is_floating_point() and source.dtype(name) not in FLOATING
    ]
    if odd:
        raise LRQuantError(
            f"{source.origin}: {len(odd)} of the model's {len(wanted)} tensors are stored as "
            f"{source.dtype(odd[0])} (first: {odd[0]}), so they are already quantised; start from "
            "the floating-point model"
        )


def _renamed(stored: Iterable[str], conversion: Conversion) -> dict[str, str]:
    """Stored names by the names that transformers gives them on loading.

    Models whose modules were renamed since their weights were published have a table of it there.
    A tensor that it would take apart or join with others keeps its name; one that it lays out
    another way under the same name has none here.
    """
    names = {}
    for name in stored:
        renamed, pattern = conversion.renamed(name)
        if pattern is None or renamed != name:
            names[name if pattern is not None else renamed] = name
    return names


def _joins(
    conversion: Conversion, stored: WeightSource, lacking: list[str], prefix: str
) -> dict[str, tuple[Join, str, tuple[int, ...]]]:
    """How what is `lacking` is joined of stored tensors: its name there, and its shape."""
    joins: dict[str, tuple[Join, str, tuple[int, ...]]] = {}
    if not lacking:
        return joins
    made: dict[str, tuple[Join, tuple[int, ...]]] = {}
    for join in conversion.joins(stored.names()).values():
        try:
            tensors = join.empty(stored.shape)
        except (RuntimeError, ValueError, LookupError):
            continue  # parts that do not fit together make nothing: what they are for is missing
        made |= {name: (join, tuple(tensor.shape)) for name, tensor in tensors.items()}
    for name, other in _match_names(made, lacking, prefix).items():
        joins[name] = made[other][0], other, made[other][1]
    return joins


def _match_names(stored: Iterable[str], wanted: Iterable[str], prefix: str) -> dict[str, str]:
    """Stored name of each wanted one: the same, or with the prefix taken off or put on."""
    stored, wanted = frozenset(stored), dict.fromkeys(wanted)
    matched = {}
    for name in wanted:
        other = name.removeprefix(prefix) if name.startswith(prefix) else prefix + name
        if name in stored:
            matched[name] = name
        elif other in stored and other not in wanted:
            matched[name] = other
    return matched
