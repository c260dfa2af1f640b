"""The schemes of a model: one for all of it, others for what patterns name."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from lrquant.config.scheme import FLOATING_POINT, Scheme
from lrquant.errors import LRQuantError


@dataclass(frozen=True)
class Schemes:
    """`default`, and in its place that of the last of `patterns` that names a matrix.

    A pattern names full dotted names that end with it, or of which it is a part, from dot to dot:
    "mlp.down_proj" in every block, "layers.0" all of the first one, "layers.0.*" the same; `*` and
    `?` stand for any characters.  `tower` is the default of a vision tower, which stays in
    floating point without.
    """

    default: Scheme
    patterns: tuple[tuple[str, Scheme], ...] = ()
    tower: Scheme | None = None

    def of(self, name: str) -> Scheme:
        """The scheme of the matrix of this full name."""
        for pattern, scheme in reversed(self.patterns):
            if matches(pattern, name):
                return scheme
        return self.default

    @property
    def of_language(self) -> Schemes:
        """Those of the language part alone."""
        return dataclasses.replace(self, tower=None)

    @property
    def of_tower(self) -> Schemes:
        """Those of the vision tower, seen as a model of its own; patterns hold where it has one."""
        if self.tower is None:
            return Schemes(FLOATING_POINT)
        return Schemes(self.tower, self.patterns)

    @property
    def every(self) -> tuple[Scheme, ...]:
        """Each scheme once, the default first, the tower's last."""
        tower = () if self.tower is None else (self.tower,)
        return tuple(
            dict.fromkeys((self.default, *(scheme for _, scheme in self.patterns), *tower))
        )

    @property
    def mixed(self) -> bool:
        """Whether patterns give some matrices a scheme of their own."""
        return any(scheme != self.default for _, scheme in self.patterns)

    @property
    def quantizes_weights(self) -> bool:
        """Whether any weight is not left in floating point."""
        return any(scheme.quantizes_weights for scheme in self.every)

    @property
    def hadamard(self) -> bool:
        """Whether any inputs are multiplied by Hadamard matrices."""
        return any(scheme.hadamard for scheme in self.every)

    @property
    def weight_only(self) -> bool:
        """Whether activations, Q, K and V stay in floating point everywhere."""
        return all(scheme.weight_only for scheme in self.every)

    @property
    def floating_point(self) -> bool:
        """Whether nothing at all is quantised."""
        return all(scheme.floating_point for scheme in self.every)

    @property
    def name(self) -> str:
        """The default's, and each pattern's."""
        return ", ".join([self.default.name, *(f"{p}={s.name}" for p, s in self.patterns)])

    def describe(self) -> str:
        """One line for people: the default, and what patterns say else."""
        others = [f"{pattern}: {scheme.name}" for pattern, scheme in self.patterns]
        return "; but ".join([self.default.describe(), *([", ".join(others)] if others else [])])

    def require_used(self, names: Sequence[str]) -> None:
        """Refuse a pattern that is the name of none of a model's matrices."""
        for pattern, _ in self.patterns:
            if not any(matches(pattern, name) for name in names):
                raise LRQuantError(
                    f"--scheme-for {pattern}: names no matrix of this model; they are called as "
                    f"{names[0]} and {names[-1]}"
                )

    def replaced(self, **changes: Scheme) -> Schemes:
        """The same with another default or tower."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern names a matrix, or a module that holds it."""
    return any(fnmatchcase(f".{name}", f"*.{each}") for each in (pattern, f"{pattern}.*"))


def parse_patterns(
    texts: Sequence[str], activation_symmetric: bool
) -> tuple[tuple[str, Scheme], ...]:
    """ "PATTERN=SCHEME" each, in their order; activations are symmetric as the run's are."""
    pairs = []
    for text in texts:
        pattern, equals, name = (each.strip() for each in text.rpartition("="))
        if not (equals and pattern):
            raise LRQuantError(
                f"scheme_for {text!r}: expected PATTERN=SCHEME, for example mlp.down_proj=W8A16"
            )
        scheme = Scheme.parse(name)
        pairs.append(
            (pattern, dataclasses.replace(scheme, activation_symmetric=activation_symmetric))
        )
    return tuple(pairs)
