"""The size of what blocks leave for later ones, found by running them without values."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from lrquant.blocks.handed import HandedOn
from lrquant.blocks.inputs import BlockInputs
from lrquant.blocks.residuals import stacked
from lrquant.blocks.streams import Stream
from lrquant.preflight.load import Load
from lrquant.preflight.probe import OneBlock

_NO_BLOCK = " "  # begins no tensor's name


@torch.no_grad()
def handed_row_bytes(load: Load) -> int:
    """Bytes that a stream keeps of a token beside its hidden states, after the last block."""
    bench, model = load.workbench, load.workbench.model
    if model.architecture.hands_on is None:
        return 0
    model = replace(model, source=OneBlock(model.source, _NO_BLOCK))
    entry, handed = BlockInputs(model, load.batch, 1, torch.device("cpu")), HandedOn({})
    entry.embed(Stream(entry.shape, bench.dtype, torch.device("cpu"), "host"))
    shape = entry.batches[0].shape
    for index, block in enumerate(model.blocks):
        arguments = entry.arguments(0, index, handed)
        own = {
            n: each if each is handed else _without_values(each) for n, each in arguments.items()
        }
        states = torch.empty((*shape, model.state_size), device="meta")
        block(stacked(states, model.residuals), **own)
    values = sum(each.numel() for states in handed.values() for each in states)
    return values // math.prod(shape) * bench.dtype.itemsize


def _without_values(value: object) -> object:
    if isinstance(value, Tensor):
        return value.to("meta")
    return tuple(map(_without_values, value)) if isinstance(value, tuple) else value
