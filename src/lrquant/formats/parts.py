"""The quantised parts of a checkpoint: the language part, and a vision tower."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lrquant.config.scheme import Scheme
from lrquant.config.schemes import Schemes


@dataclass(frozen=True)
class Part:
    """Blocks under some schemes: the path of their list, and what is in them by full names.

    `linears` has the scheme of each module whose weight is on a grid, or that reads quantised
    activations, `attentions` that of Q, K and V of each attention; `names` are all tensors, and
    `hadamard_sizes` those of the matrices that inputs of linears are multiplied by.
    """

    blocks: str
    schemes: Schemes
    linears: Mapping[str, Scheme] = field(default_factory=dict)
    names: Sequence[str] = ()
    attentions: Mapping[str, Scheme] = field(default_factory=dict)
    hadamard_sizes: Mapping[str, int] = field(default_factory=dict)

    @property
    def scheme(self) -> Scheme:
        """That of most of its linears."""
        counts = Counter(scheme for scheme in self.linears.values() if not scheme.floating_point)
        return counts.most_common(1)[0][0] if counts else self.schemes.default

    @property
    def groups(self) -> dict[Scheme, list[str]]:
        """Full names of the linears of each scheme, that of most of them first."""
        first = self.scheme
        groups: dict[Scheme, list[str]] = {first: []}
        for name, scheme in self.linears.items():
            groups.setdefault(scheme, []).append(name)
        return groups

    @property
    def mixed(self) -> bool:
        """Whether its linears have several schemes."""
        return len(self.groups) > 1
