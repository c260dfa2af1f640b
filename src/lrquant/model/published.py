"""The names of a model's own files, in which each expert may have tensors of its own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor
from transformers import PreTrainedModel

from lrquant.architectures.matrix import Matrix
from lrquant.model.sources.conversion import Conversion


class Published:
    """What loaders of a model's checkpoints expect where transformers joins experts on loading.

    Where it joins none, everything has the name that it has in the model.
    """

    def __init__(self, skeleton: PreTrainedModel, blocks: Mapping[str, Iterable[Matrix]]) -> None:
        self._conversion = Conversion(skeleton)
        self._alone = {block: self._parts(block, matrices) for block, matrices in blocks.items()}
        self.apart = any(self._alone.values())
        self._inside = tuple(f"{block}." for block in self._alone)
        self._float32 = sorted(skeleton._keep_in_fp32_modules_strict or ())

    def _parts(self, block: str, matrices: Iterable[Matrix]) -> frozenset[str]:
        """Matrices of a block that are tensors of their own in files; one tells of a parameter."""
        by_parameter: dict[str, list[str]] = {}
        for matrix in matrices:
            if matrix.expert is not None:
                by_parameter.setdefault(matrix.parameter, []).append(matrix.name)
        return frozenset(
            name
            for parameter, names in by_parameter.items()
            if self._conversion.holds(f"{block}.{parameter}", f"{block}.{names[0]}.weight")
            for name in names
        )

    def alone(self, block: str) -> frozenset[str]:
        """The matrices of a block, by its full name, that are tensors of their own in files."""
        return self._alone.get(block, frozenset())

    def name(self, name: str) -> str:
        """The name in files of a tensor or module: of experts' parts, not of what they are in."""
        inside = self.apart and name.startswith(self._inside)
        return self._conversion.published(name) if inside else name

    def wide(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those that transformers keeps in float32 whatever the model's dtype, in it.

        Such as the correction of a router's scores, by whose last bits tokens change experts.
        """
        if not self.apart or not self._float32:
            return {}
        kept = re.compile(rf"(^|\.)({'|'.join(map(re.escape, self._float32))})($|\.)")
        return {name: tensor.float() for name, tensor in tensors.items() if kept.search(name)}

    def named(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by their names in files."""
        return {self.name(name): tensor for name, tensor in tensors.items()}

    def loaded(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Dense tensors of files by their names in the model, experts joined."""
        return self._conversion.loaded(tensors) if self.apart else dict(tensors)
