"""Loading of a checkpoint by a runtime: whether it does, and what it then computes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

AS_LEARNED = "what was learned"


@dataclass(frozen=True)
class Loading:
    """How a runtime takes a scheme in a format: not at all (`refusal`), or with `notes`.

    With `transforms` it multiplies inputs by Hadamard matrices itself, of some linears alone.
    `unsaid` is a refusal that the runtime itself does not give: it loads, and computes wrongly.
    `computes` is `AS_LEARNED`, to the rounding of the runtime's dtype, or says what else and where.
    `serve` is the command that serves it so that most is as learned, where that is a special one.
    `multiple` must divide in and out of every (fused) linear for the runtime's kernels.
    """

    refusal: str | None = None
    notes: tuple[str, ...] = ()
    computes: str = AS_LEARNED
    serve: str = ""
    multiple: int = 1
    unsaid: bool = False
    transforms: bool = False

    @property
    def as_learned(self) -> bool:
        """Whether it computes what was learned, whatever the machine."""
        return self.computes == AS_LEARNED

    def command(self, place: str) -> str:
        """The command line by which vLLM serves the checkpoint in a folder, or of a hub name."""
        return (self.serve or "vllm serve FOLDER").replace("FOLDER", place)


def merged(loadings: Sequence[Loading]) -> Loading:
    """Of a model of several parts: what any of them refuses, notes, asks for or changes."""
    changed = dict.fromkeys(each.computes for each in loadings if not each.as_learned)
    refused = next((each for each in loadings if each.refusal), Loading())
    return Loading(
        refusal=refused.refusal,
        unsaid=refused.unsaid,
        notes=tuple(dict.fromkeys(note for each in loadings for note in each.notes)),
        computes="; and ".join(changed) or AS_LEARNED,
        serve=max((each.serve for each in loadings), key=len),
        multiple=math.lcm(*(each.multiple for each in loadings)),
        transforms=any(each.transforms for each in loadings),
    )
