"""A block that is ready to be learned, and what records its steps."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lrquant.blocks.inputs import BlockInputs
from lrquant.blocks.plan import Plan, learned_by
from lrquant.blocks.workbench import advance_full_precision
from lrquant.config.scheme import Scheme
from lrquant.config.schemes import Schemes
from lrquant.ingredients.base.statistics import ChannelStatistics
from lrquant.learn.block_data import BlockData

BATCHES = 4
W2A8 = Scheme(2, 8)


@pytest.fixture
def block(make_model, make_bench, token_ids):
    """A function that makes block 0 of a tiny model ready to be learned."""

    def make(model=None, scheme=W2A8, batch_size=1, branches=1, **learned):
        plan = Plan(Schemes(scheme), learned_by(**(learned or {"lwc": True, "let": True})))
        bench = make_bench(model or make_model("llama"), plan=plan)
        entry = BlockInputs(bench.model, token_ids(BATCHES, 12), batch_size, bench.device)
        inputs, *targets = bench.streams(entry, 1 + branches)
        entry.embed(inputs)
        statistics = ChannelStatistics()
        stored = bench.stored(0)
        for stream in targets:
            advance_full_precision(bench, 0, stored, entry, inputs, stream, statistics.observe)
        view = bench.view(0, stored)
        view.initialize(statistics)
        return view, bench.runner(0, view), BlockData(0, entry, inputs, tuple(targets))

    return make


class Recording(TorchDispatchMode):
    """What a CUDA graph does, on a CPU: operations as a step does them are kept.

    Recording them leaves what there was.  `replay` does them again: each reads and writes the
    tensors that it did while recorded.
    """

    def __init__(self):
        super().__init__()
        self.operations = []
        self._own, self._before = set(), []

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        named = named or {}
        if operation is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a value is asked of the device while a step is recorded")
        self._keep(operation, arguments, named)
        result = operation(*arguments, **named)
        outputs = _tensors(result)
        inputs = {_place(each) for each in _tensors((arguments, named))}
        self._own |= {_place(each) for each in outputs} - inputs
        self.operations.append((operation, arguments, named, outputs))
        return result

    def _keep(self, operation, arguments, named):
        """What the step writes over that was there before it."""
        pairs = zip(operation._schema.arguments, arguments, strict=False)
        written = [value for argument, value in pairs if _writes(argument)]
        written += [
            named[a.name] for a in operation._schema.arguments if a.name in named and _writes(a)
        ]
        for tensor in _tensors(written):
            if _place(tensor) not in self._own:
                self._before.append((tensor, tensor.clone()))

    def undo(self):
        for tensor, before in reversed(self._before):
            tensor.copy_(before)

    @torch.no_grad()
    def replay(self):
        for operation, arguments, named, outputs in self.operations:
            for own, again in zip(outputs, _tensors(operation(*arguments, **named)), strict=True):
                if own.data_ptr() != again.data_ptr():
                    own.copy_(again)


@pytest.fixture
def record():
    """record(step) -> its loss, and what does it again: see `lrquant.learn.captured.Record`."""

    def keep(step):
        recording = Recording()
        with recording:
            loss = step()
        with torch.no_grad():
            recording.undo()
        return loss, recording.replay

    return keep


def _writes(argument):
    return argument.alias_info is not None and argument.alias_info.is_write


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _place(tensor):
    return tensor.untyped_storage().data_ptr()
