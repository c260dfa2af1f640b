"""The time and the memory that the end-to-end stage will take."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lrquant.blocks.head import HEAD_TOKENS
from lrquant.ingredients.tuning import Tuning
from lrquant.learn.tuning import HELD_SHARE
from lrquant.preflight.estimate import head_seconds, outer_elements
from lrquant.preflight.kinds import KindCosts
from lrquant.preflight.load import Load


def tuning_bytes(load: Load, tuning: Tuning) -> int:
    """Codes of all blocks, what enters each of a batch, one block's gradients, head and logits.

    A weight whose rounding is tuned has a position beside, and a fifth of a byte for what was best.
    """
    model, dtype = load.workbench.model, load.workbench.dtype
    blocks = [sum(t.numel() for t in block.state_dict().values()) for block in model.blocks]
    tokens = math.prod(next(iter(load.batch.inputs[0].values())).shape[:2]) * len(load.batch)
    states = (len(blocks) + 1) * tokens * model.state_size * 4
    logits = min(HEAD_TOKENS, tokens) * model.config.vocab_size * 4 * 6
    head = outer_elements(model)["head"] * dtype.itemsize
    of_weight = 1 + 2 + 0.2 if tuning.tune_rounding else 1
    return round(of_weight * sum(blocks)) + 12 * max(blocks) + states + logits + head


def tuning_seconds(load: Load, costs: Sequence[KindCosts], tuning: Tuning) -> float:
    """Time of the end-to-end stage: passes of all blocks, forward twice and back once a step."""
    model, held = load.workbench.model, 1 / HELD_SHARE
    total = (
        head_seconds(model, costs)
        * load.rows
        * load.share
        * (tuning.tune_epochs * (5 * (1 - held) + 2 * held) + 2 * held)
    )
    for kind in costs:
        own, batches = kind.costs, load.rows / kind.costs.rows * load.share
        passes = tuning.tune_epochs * (1 - held) * (own.held + own.step)
        passes += (tuning.tune_epochs + 1) * held * own.held + own.full
        total += len(kind.blocks) * (own.read + own.freeze + batches * passes)
    return total
