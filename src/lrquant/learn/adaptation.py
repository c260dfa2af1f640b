"""Test-time adaptation (LRQuant, ACL 2024): the last blocks learned again on the text to score.

It sees the test text, never labels: its results stand under their own name beside the plain ones,
and the parameters it learns in a folder of their own.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch

from lrquant.blocks.inputs import BlockInputs
from lrquant.blocks.plan import Plan
from lrquant.blocks.workbench import Workbench, advance_full_precision, learned_view
from lrquant.config.config import Config
from lrquant.data.conversations import is_conversations
from lrquant.data.samples import Samples
from lrquant.errors import LRQuantError
from lrquant.learn.fit import BlockData, advance_quantized, fit_block
from lrquant.learn.identity import fit_settings
from lrquant.runs.folder import RunFolder
from lrquant.runs.progress import Progress

logger = logging.getLogger("lrquant")


def check_adaptation(config: Config, blocks: int, pictures: bool = False) -> None:
    """Refuse, before any hour is spent, an adaptation that has nothing to learn.

    `pictures` says whether the model takes conversations with some.
    """
    if not config.tta:
        return
    if not config.ingredients():
        raise LRQuantError(
            "--tta: the run learns nothing that could be adapted; give --lwc, --let or --lr-plus"
        )
    if config.tta_blocks > blocks:
        raise LRQuantError(f"--tta_blocks {config.tta_blocks}: the model has {blocks} blocks")
    conversations = [name for name in config.perplexity_sets if is_conversations(Path(name))]
    if conversations and pictures:
        raise LRQuantError(f"--tta {conversations[0]}: adapts to text alone, not to conversations")
    if not config.perplexity_sets:
        raise LRQuantError("--tta: no text to adapt to and measure on; give --ppl or --eval_ppl")


def adapt(
    workbench: Workbench,
    config: Config,
    folder: RunFolder,
    text: Samples,
    progress: Progress,
) -> dict[str, Any]:
    """Learn the last `tta_blocks` blocks again on `text`, from the run's own parameters.

    Each is compared with the full-precision block on that block's true inputs in the
    full-precision model, both streams having gone through all blocks before it; the loss is the
    run's `loss` on that one branch, unweighted.  Returns how it was done and what came of it.
    """
    model = workbench.model
    blocks = len(model.blocks)
    settings = dataclasses.replace(
        fit_settings(config),
        epochs=config.tta_epochs,
        two_branch=False,
        dynamic_weights=False,
    )
    ingredients = tuple(each.adapted() for each in workbench.plan.ingredients)
    learned = ", ".join(each.description for each in ingredients)
    done: dict[str, Any] = {"epochs": config.tta_epochs, "learned": learned, "blocks": []}
    entry = BlockInputs(model, text.feed, config.batch_size, workbench.device)
    full, quantized = workbench.streams(entry, 2)
    entry.embed(full)
    quantized.copy(full)
    folder.forget_adapted(text.name)
    with progress.measuring(f"adapting to {text.name}", blocks) as told, torch.enable_grad():
        for index in range(blocks):
            view = learned_view(workbench, folder, index)
            advance_full_precision(workbench, index, view.stored, entry, full, full)
            data = BlockData(index, entry, quantized, (full,))
            adapted = index >= blocks - config.tta_blocks
            with workbench.runner(index, view) as runner:
                if adapted:
                    view.ingredients = ingredients
                    report = fit_block(view, runner, data, settings)
                    folder.save_adapted(text.name, index, view.parameters)
                final = float(advance_quantized(view, runner, data, settings.loss).sum())
            if adapted:
                losses = {"initial_loss": report.initial_loss, "final_loss": final}
                done["blocks"].append({"block": index, **losses, "non_finite": report.non_finite})
                logger.info(
                    "test-time adaptation to %s, block %d: loss %.6g -> %.6g%s",
                    *(text.name, index, report.initial_loss, final),
                    "".join(f"; NOT FINITE at {event}" for event in report.non_finite),
                )
            told(index)
    return done


def describe_adaptation(config: Config) -> str:
    """How long and how much is learned again, in words."""
    rates = [f"{each.name}_lr {each.adapted().rate:g}" for each in Plan.of(config).ingredients]
    return ", ".join([f"last {config.tta_blocks}, {config.tta_epochs} epochs", *rates])
