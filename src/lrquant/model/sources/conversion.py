"""What transformers makes of stored tensors on loading: other names, and one out of several."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

Read = Callable[[str], Tensor]
_BLOCK = re.compile(r".+?\.[0-9]+\.")


@dataclass(frozen=True)
class Join:
    """Tensors of a model that are made of stored `parts`, (pattern, name) of each, in order.

    `target` is the name of the first of them.
    """

    target: str
    parts: tuple[tuple[str, str], ...]
    converter: WeightConverter
    skeleton: PreTrainedModel

    def of(self, read: Read) -> dict[str, Tensor]:
        """The tensors by name, of stored ones."""
        converter = copy.deepcopy(self.converter)
        for pattern, name in self.parts:
            # a tensor, as transformers itself hands it over when it saves
            converter.add_tensor(self.target, name, pattern, read(name))  # type: ignore[arg-type]
        made = converter.convert(self.target, model=self.skeleton, config=self.skeleton.config)
        return {n: each[0] if isinstance(each, list) else each for n, each in made.items()}

    def empty(self, shape: Callable[[str], tuple[int, ...]]) -> dict[str, Tensor]:
        """The tensors without values, of the stored ones' shapes."""
        return self.of(lambda name: torch.empty(shape(name), device="meta"))

    @property
    def names(self) -> frozenset[str]:
        """The stored names of the parts."""
        return frozenset(name for _, name in self.parts)


class Conversion:
    """The table that transformers has for a model."""

    def __init__(self, skeleton: PreTrainedModel) -> None:
        transforms = get_model_conversion_mapping(skeleton)
        self._renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        self._skeleton = skeleton

    def renamed(self, name: str) -> tuple[str, str | None]:
        """The name of what a stored tensor becomes, and the pattern of what it is a part of."""
        renamed: tuple[str, str | None] = rename_source_key(name, self._renamings, self._converters)
        return renamed

    def joins(self, stored: Iterable[str]) -> dict[str, Join]:
        """What stored tensors are joined to, by its name, or taken apart to, by the first's."""
        parts: dict[str, list[tuple[str, str]]] = {}
        for name in sorted(stored, key=dot_natural_key):
            target, pattern = self.renamed(name)
            if pattern is not None:
                parts.setdefault(target, []).append((pattern, name))
        by_pattern = {each: entry for entry in self._converters for each in entry.source_patterns}
        return {
            target: Join(target, tuple(own), by_pattern[own[0][0]], self._skeleton)
            for target, own in parts.items()
        }

    def loaded(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by the names of the model, joined; what has no other name keeps its own."""
        joins = self.joins(tensors)
        parts = {name for join in joins.values() for name in join.names}
        loaded = {self.renamed(n)[0]: tensor for n, tensor in tensors.items() if n not in parts}
        for join in joins.values():
            loaded |= join.of(tensors.__getitem__)
        return loaded

    def holds(self, parameter: str, part: str) -> bool:
        """Whether a stored tensor of that name is a part of a parameter of the model."""
        renamed, pattern = self.renamed(part)
        return pattern is not None and renamed == parameter

    def published(self, name: str) -> str:
        """The name under which the model's own files hold a tensor that is no part of another.

        What is renamed is within a block: its path, and what is outside, is as the model has it.
        """
        match = _BLOCK.match(name)
        if match is None:
            return name
        renamed, path = (
            str(rename_source_key(each, self._back, [])[0]) for each in (name, match[0])
        )
        return match[0] + renamed.removeprefix(path) if renamed.startswith(path) else name

    @cached_property
    def _back(self) -> list[WeightRenaming]:
        mapping = get_model_conversion_mapping(self._skeleton, add_legacy=False)
        back = [each.reverse_transform() for each in mapping[::-1]]
        renamings = [each for each in back if isinstance(each, WeightRenaming)]
        return [each for each in renamings if not isinstance(each, PrefixChange)]
