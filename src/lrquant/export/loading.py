"""Loading of a checkpoint by a runtime: whether it does, and what it then computes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

AS_LEARNED = "what was learned"


@dataclass(frozen=True)
class Loading:
    """How a runtime takes a scheme in a format: not at all (`refusal`), or with `notes`.

    `computes` is `AS_LEARNED`, to the rounding of the runtime's dtype, or says what else and where.
    `serve` is the command that serves it so that most is as learned, where that is a special one.
    `multiple` must divide in and out of every (fused) linear for the runtime's kernels.
    """

    refusal: str | None = None
    notes: tuple[str, ...] = ()
    computes: str = AS_LEARNED
    serve: str = ""
    multiple: int = 1

    @property
    def as_learned(self) -> bool:
        """Whether it computes what was learned, whatever the machine."""
        return self.computes == AS_LEARNED


def merged(parts: Sequence[Loading]) -> Loading:
    """Of a model of several parts: what any of them refuses, notes, asks for or changes."""
    changed = dict.fromkeys(part.computes for part in parts if not part.as_learned)
    return Loading(
        refusal=next((part.refusal for part in parts if part.refusal), None),
        notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
        computes="; and ".join(changed) or AS_LEARNED,
        serve=max((part.serve for part in parts), key=len),
        multiple=math.lcm(*(part.multiple for part in parts)),
    )
