"""Test-time adaptation (LRQuant, ACL 2024): the last blocks learned again on the text to score.

It sees the test text, never labels: its results stand under their own name beside the plain ones,
and the parameters it learns in a folder of their own.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lrquant.blocks.inputs import BlockInputs
from lrquant.blocks.streams import Stream
from lrquant.blocks.view import BlockView
from lrquant.blocks.workbench import Workbench, advance_full_precision, loaded_view
from lrquant.config.groups import Adapting, Learning
from lrquant.data.conversations import is_conversations
from lrquant.data.samples import Samples
from lrquant.errors import LRQuantError
from lrquant.files.whole import JsonObject
from lrquant.ingredients.ingredient import Ingredient
from lrquant.learn.block_data import BlockData
from lrquant.learn.captured import recorder
from lrquant.learn.fit import advance_quantized
from lrquant.learn.groups import fit_in_groups
from lrquant.learn.share import Share, shared_inputs
from lrquant.learn.stage import carry_out, units_of
from lrquant.model.device import dtype_name
from lrquant.runs.folder import RunFolder
from lrquant.runs.progress import Progress
from lrquant.runs.stages import StageFolder
from lrquant.team.team import ALONE, Team

logger = logging.getLogger("lrquant")


def check_adaptation(
    adapting: Adapting,
    ingredients: Sequence[Ingredient],
    texts: Sequence[str],
    blocks: int,
    pictures: bool = False,
) -> None:
    """Refuse, before any hour is spent, an adaptation that has nothing to learn.

    `texts` names those that are measured, `blocks` is how many the model has, `pictures` says
    whether it takes conversations with some.
    """
    if not any(each.adapts for each in ingredients):
        raise LRQuantError(
            "--tta: the run learns nothing that could be adapted; give --lwc, --let or --lr-plus"
        )
    if adapting.blocks > blocks:
        raise LRQuantError(f"--tta_blocks {adapting.blocks}: the model has {blocks} blocks")
    conversations = [name for name in texts if is_conversations(Path(name))]
    if conversations and pictures:
        raise LRQuantError(f"--tta {conversations[0]}: adapts to text alone, not to conversations")
    if not texts:
        raise LRQuantError("--tta: no text to adapt to and measure on; give --ppl or --eval_ppl")


def adapt(
    workbench: Workbench,
    learning: Learning,
    adapting: Adapting,
    folder: RunFolder,
    text: Samples,
    progress: Progress,
    *,
    team: Team = ALONE,
) -> JsonObject:
    """Learn the last blocks again on `text`, from the run's own parameters.

    Each is compared with the full-precision block on that block's true inputs in the
    full-precision model, both streams having gone through all blocks before it; the loss is the
    run's `loss` on that one branch, unweighted.  Returns how it was done and what came of it.
    Of a `team` each member takes its share of the text; the first alone uses the folder.
    """
    again = dataclasses.replace(
        learning, epochs=adapting.epochs, window=1, two_branch=False, dynamic_weights=False
    )
    steps = learning.batch_size, learning.micro_batch_size
    entry, share = shared_inputs(workbench, text.feed, *steps, team)
    full, quantized = workbench.streams(entry, 2)
    entry.embed(full)
    quantized.copy(full)
    blocks = len(workbench.model.blocks)
    with progress.measuring(f"adapting to {text.name}", blocks) as told, torch.enable_grad():
        stage = Adaptation(
            *(workbench, again, folder, text, blocks - adapting.blocks),
            *(entry, full, quantized, told, share),
        )
        carry_out(stage)
    return {"epochs": adapting.epochs, "learned": stage.learned, "blocks": stage.records}


@dataclass(frozen=True)
class Adaptation:
    """The stage in which the blocks from `first` on are learned again, one by one, on a text.

    A block that an earlier start has adapted to the same text, under the same settings and after
    the same blocks, is kept.
    """

    workbench: Workbench
    learning: Learning
    folder: RunFolder
    text: Samples
    first: int
    entry: BlockInputs
    full: Stream
    quantized: Stream
    told: Callable[[int], None]
    share: Share
    records: list[JsonObject] = field(default_factory=list)
    name = "adapted"

    @property
    def team(self) -> Team:
        """The processes that adapt."""
        return self.share.team

    @property
    def own(self) -> StageFolder:
        """The blocks that were adapted to the text."""
        return adapted_to(self.text.name, self.folder)

    @property
    def ingredients(self) -> tuple[Ingredient, ...]:
        """What is learned, at the rates of adaptation."""
        return tuple(each.adapted() for each in self.workbench.plan.ingredients)

    @property
    def learned(self) -> str:
        """The same in words."""
        return ", ".join(each.description for each in self.ingredients if each.adapts)

    @property
    def units(self) -> list[range]:
        """Every block, as the text goes through all of them."""
        return units_of(len(self.workbench.model.blocks), 1)

    @property
    def _about(self) -> JsonObject:
        """What must be the same for an adapted block to be kept."""
        how = json.loads(json.dumps(dataclasses.asdict(self.learning)))
        del how["batch_size"], how["micro_batch_size"]  # those of the run, which has no others
        if not self.learning.expert_group:
            del how["expert_group"]
        bench = self.workbench
        where = {"precision": dtype_name(bench.dtype), "device": bench.device.type}
        of = {"text": self.text.sha256, "run": self.folder.hash_of(len(bench.model.blocks))}
        return {**of, "first": self.first, "learned": self.learned, **where, **how}

    def kept(self) -> int:
        """The blocks that stay as the run learned them, and those adapted before; others go."""
        return self.team.first(self._kept)

    def _kept(self) -> int:
        kept, blocks, of = self.first, len(self.workbench.model.blocks), self._about
        while kept < blocks:
            about = self.own.about(kept)
            if about is None or about["of"] != of:
                break
            kept += 1
        self.own.forget(range(self.first, kept))
        return kept

    def pass_through(self, unit: range) -> None:
        """Move on through a block as it is."""
        load = self.folder.learned
        if unit.start >= self.first:
            load = self.own.load
            about = self.team.first(partial(self.own.about, unit.start))
            self.records.append({} if about is None else about["record"])
        view = self._view(unit.start, load)
        data = self._advance_full(unit.start, view)
        with self.workbench.runner(unit.start, view) as runner:
            advance_quantized(view, runner, data, self.learning.loss)
        self.told(unit.start)

    def learn(self, unit: range) -> None:
        """Learn a block again, and keep it beside the one that the run learned."""
        index = unit.start
        view = self._view(index, self.folder.learned)
        view.ingredients = self.ingredients
        data = self._advance_full(index, view)
        with self.workbench.runner(index, view) as runner:
            keep = recorder(self.workbench, [view], self.team)
            report = fit_in_groups(view, runner, data, self.learning, record=keep)
            final = float(advance_quantized(view, runner, data, self.learning.loss).sum())
        record: JsonObject = {
            "block": index,
            "initial_loss": report.initial_loss,
            "final_loss": final,
        }
        record |= {"non_finite": report.non_finite}
        self.team.first(partial(self._keep, view, record))
        self.records.append(record)
        self.told(index)

    def _keep(self, view: BlockView, record: JsonObject) -> None:
        """Keep an adapted block, and tell what came of it."""
        about = {"of": self._about, "record": record}
        self.own.save(record["block"], view.kept, about)
        logger.info(
            "test-time adaptation to %s, block %d: loss %.6g -> %.6g%s",
            *(self.text.name, record["block"], record["initial_loss"], record["final_loss"]),
            "".join(f"; NOT FINITE at {event}" for event in record["non_finite"]),
        )

    def _view(self, index: int, load: Callable[[int], dict[str, Tensor]]) -> BlockView:
        """A block with the learned parameters that `load` has of it."""
        return loaded_view(self.workbench, index, lambda i: self.team.first(partial(load, i)))

    def _advance_full(self, index: int, view: BlockView) -> BlockData:
        """The full-precision stream moves on; the text as the block sees it."""
        bench, full = self.workbench, self.full
        advance_full_precision(bench, index, view.stored, self.entry, full, full)
        return BlockData(index, self.entry, self.quantized, (full,), share=self.share)


def adapted_to(text: str, folder: RunFolder) -> StageFolder:
    """A run's blocks that were adapted to the text so named."""
    return folder.stage(Adaptation.name, text)


def describe_adaptation(adapting: Adapting, ingredients: Sequence[Ingredient]) -> str:
    """How long and how much is learned again, in words."""
    again = [each.adapted() for each in ingredients if each.adapts]
    rates = [f"{each.name}_lr {each.rate:g}" for each in again]
    return ", ".join([f"last {adapting.blocks}, {adapting.epochs} epochs", *rates])
