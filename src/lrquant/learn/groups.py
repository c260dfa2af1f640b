"""Groups of experts: those of a block that leaves memory are learned some at a time.

All else of the block is learned with the first group, while the other experts are quantised as
they start; then each group by itself, after what the groups before it were learned to.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from lrquant.blocks.view import BlockView
from lrquant.config.groups import Learning
from lrquant.ingredients.ingredient import owner_of
from lrquant.learn.block_data import BlockData, Runner
from lrquant.learn.captured import Record
from lrquant.learn.fit import FitReport, Learnable, Progress, fit_block


def fit_in_groups(
    view: Learnable,
    runner: Runner,
    data: BlockData,
    learning: Learning,
    progress: Progress = lambda step, loss: None,
    record: Record | None = None,
) -> FitReport:
    """Learn the view's parameters in place, as `fit_block` does, for each group of experts."""
    if not (learning.expert_group and isinstance(view, BlockView)):
        return fit_block(view, runner, data, learning, progress, record=record)
    groups = groups_of(view, learning.expert_group)
    still, reports = view.still, list[FitReport]()
    for number, group in enumerate(groups):
        view.still = frozenset(view.parameters) - group
        if reports:  # from the second on nothing changes another expert's inputs or weights
            view.fix_(_others(view, group))
        told = partial(_tell, progress, learning.epochs * len(data.shared.counts), number, groups)
        objective = reports[0].objective if reports else None
        reports.append(fit_block(view, runner, data, learning, told, objective))
        view.compact_()
    view.fix_(())
    view.still = still
    return _joined(reports)


def _others(view: BlockView, group: frozenset[str]) -> list[str]:
    """Matrices of all experts but those of a group."""
    owners = (view.matrices.get(owner_of(name)) for name in group)
    own = {None, *(matrix.expert for matrix in owners if matrix is not None)}
    return [name for name, matrix in view.matrices.items() if matrix.expert not in own]


def groups_of(view: BlockView, size: int) -> list[frozenset[str]]:
    """Names of parameters that are learned together, of `size` experts each; 0: of all.

    Experts that learn nothing are in none, what is no expert's is in the first.
    """
    own: dict[int | None, frozenset[str]] = {}
    for name in view.moving:
        matrix = view.matrices.get(owner_of(name))
        expert = None if matrix is None else matrix.expert
        own[expert] = own.get(expert, frozenset()) | {name}
    experts = sorted(expert for expert in own if expert is not None)
    step = size or len(experts) or 1
    groups = [
        frozenset[str]().union(*(own[expert] for expert in experts[start : start + step]))
        for start in range(0, len(experts), step)
    ]
    first, *rest = groups or [frozenset[str]()]
    return [first | own.get(None, frozenset()), *rest]


def _tell(
    progress: Callable[[int, float], None],
    steps: int,
    number: int,
    groups: list[frozenset[str]],
    step: int,
    loss: float,
) -> None:
    """Of the `steps` of a group, as a share of all groups' for the block: when that grows."""
    before = number * steps + step - 1
    if before % len(groups) == 0:
        progress(before // len(groups) + 1, loss)


def _joined(reports: list[FitReport]) -> FitReport:
    """One report of all groups, whose epochs are counted on."""
    first = reports[0]
    joined = FitReport(first.objective, first.initial_loss)
    for report in reports:
        if report.best_epoch is not None:
            best = len(joined.epoch_losses) + report.best_epoch if report.best_epoch else 0
            joined.best_epoch = best or joined.best_epoch or 0
        joined.epoch_losses += report.epoch_losses
        joined.held_losses += report.held_losses
        joined.non_finite += report.non_finite
    return joined
