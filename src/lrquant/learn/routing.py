"""Where a block's tokens go: how many reach each expert, and whether quantisation sends them on."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lrquant.blocks.view import BlockView
from lrquant.files.whole import JsonObject

Counts = dict[str, Tensor]
Everyone = Callable[[Counts], list[Counts]]
_WATCHED = 4  # batches of which each token's experts are kept


@dataclass
class Routing:
    """Of each module of experts, by its name in the block, under full precision.

    counts: how many tokens each expert gets, int64 (experts,).  chosen: the experts of each token
    of the first batches, (tokens, chosen).
    """

    counts: dict[str, Tensor] = field(default_factory=dict)
    chosen: dict[str, list[Tensor]] = field(default_factory=dict)

    def see(self, view: BlockView, weights: Tensor | None, name: str, chosen: Tensor) -> None:
        """Take in one batch's (tokens, chosen); tokens of weight 0 are not counted."""
        experts = _experts_of(view, name)
        seen = chosen if weights is None else chosen[weights.flatten() > 0]
        counts = seen.flatten().bincount(minlength=experts).cpu()
        self.counts[name] = self.counts[name] + counts if name in self.counts else counts
        first = self.chosen.setdefault(name, [])
        if len(first) < _WATCHED:
            first.append(chosen)

    def merged(self, each: Everyone) -> Routing:
        """The counts of a team's whole set, of `each` member's; first batches stay its own."""
        members = each(self.counts)
        counts = {name: torch.stack([own[name] for own in members]).sum(0) for name in self.counts}
        return Routing(counts, self.chosen)

    def starved(self, view: BlockView, fewest: int) -> frozenset[str]:
        """Matrices of experts that fewer tokens reach."""
        matrices = view.matrices.items()
        experts = [(name, matrix) for name, matrix in matrices if matrix.expert is not None]
        return frozenset(
            name
            for name, matrix in experts
            if (counts := self.counts.get(matrix.parameter.rpartition(".")[0])) is not None
            and int(counts[matrix.expert]) < fewest
        )

    def figures(self, others: dict[str, list[Tensor]], starved: Collection[str]) -> JsonObject:
        """By module: tokens of each expert, the share of choices that are not among those of
        `others`, and how many experts are starved."""
        figures: JsonObject = {}
        for name, counts in self.counts.items():
            kept = {each.removeprefix(f"{name}.").partition(".")[0] for each in starved}
            pairs = list(zip(self.chosen[name], others.get(name, []), strict=False))
            figures[name] = {
                "tokens": counts.tolist(),
                "kept_start": sum(1 for number in kept if number.isdecimal()),
                "changed": _changed(pairs),
            }
        return figures


def _experts_of(view: BlockView, name: str) -> int:
    matrices = view.matrices.values()
    own = {m.expert for m in matrices if m.parameter.startswith(f"{name}.")} - {None}
    return len(own)


def _changed(pairs: list[tuple[Tensor, Tensor]]) -> float | None:
    """Share of the experts of tokens (tokens, chosen) that are not among the other ones."""
    if not pairs:
        return None
    left, right = (torch.cat([pair[side].cpu() for pair in pairs]) for side in (0, 1))
    same = (left[:, :, None] == right[:, None, :]).any(-1)
    return float(1 - same.double().mean())
