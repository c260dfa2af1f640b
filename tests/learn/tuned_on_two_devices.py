"""Tuning on a device that computes nothing: an operation on it and on the host is an error.

What goes between the two is what a pre-flight counts.
"""

from __future__ import annotations

import sys

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import AutoConfig, AutoModelForCausalLM

import pretended
from lrquant.blocks.head import Head
from lrquant.blocks.inputs import BlockInputs
from lrquant.blocks.plan import Plan
from lrquant.blocks.tuned import TunedBlock, tuned_bytes
from lrquant.blocks.workbench import Workbench, shape_view
from lrquant.config.scheme import Scheme
from lrquant.config.schemes import Schemes
from lrquant.data.feeds import Feed
from lrquant.ingredients.base.statistics import ChannelStatistics
from lrquant.ingredients.tuning import Tuning
from lrquant.learn.share import Share
from lrquant.learn.whole_model import TunedSamples, WholeFit
from lrquant.model.loading import from_module
from lrquant.preflight.tuning import Transfers

HOST, DEVICE = "cpu", "pretended:0"
TUNING = Tuning(tune=True, tune_epochs=2, tune_rounding=True)
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class Values(TorchDispatchMode):
    """What is read of tensors without values: 1, and two of them are equal.

    `moved` are the bytes that went from one device to another.
    """

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self._fake, self.moved = fake, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            return 1.0
        if function is torch.ops.aten.equal.default:
            return True
        args, kwargs = tree_map_only(torch.Tensor, self._without_values, (args, kwargs or {}))
        result = function(*args, **kwargs)
        if function in COPIES:
            places = {each.device for each in (result, *args) if isinstance(each, torch.Tensor)}
            self.moved += result.nbytes * (len(places) > 1)
        return result

    def _without_values(self, tensor):
        return tensor if isinstance(tensor, FakeTensor) else self._fake.from_tensor(tensor)


def tune(folder: str, home: torch.device) -> tuple[list[TunedBlock], float]:
    """The blocks of a model after two steps, measured and kept.

    And the share that has moved of what a pre-flight counts.
    """
    config = AutoConfig.from_pretrained(folder, attn_implementation="eager")
    model = from_module(AutoModelForCausalLM.from_pretrained(folder, config=config))
    plan = Plan(Schemes(Scheme(4, 8, 16)), (TUNING,))
    device = torch.device(DEVICE)
    bench = Workbench(model, device, torch.float32, "host", plan=plan)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, Values(fake) as values:
        feed = Feed.of_tokens(torch.ones((4, 12), dtype=torch.long))
        entry = BlockInputs(model, feed, 1, device)
        first, target = bench.streams(entry, 2)
        entry.embed_both(target, first, (None, None))
        share = Share(Share.alone(1).team, [[2], [2]], [0.5] * 4)
        samples = TunedSamples(entry, share, first, target)
        blocks = [block_of(bench, index).on(home) for index in range(len(model.blocks))]
        head = Head(model, device, torch.float32)
        values.moved = 0
        fit = WholeFit(blocks, head, TUNING, samples, samples, lambda step: None)
        for block in blocks:
            block.begin(2)
        for step in range(2):
            fit._step(step)
        fit._divergence(samples)
        fit._keep()
        assert all(each.device == home for best in fit.best for each in best.values())
    sizes = [tuned_bytes(shape_view(model, index, plan), TUNING) for index in range(len(blocks))]
    states = len(blocks) * 2 * 12 * model.state_size * 4
    counted = Transfers(sum(sizes), states).during(learned=2, measured=2, kept=1)
    return blocks, values.moved / counted


def block_of(bench: Workbench, index: int) -> TunedBlock:
    """A block that is rounded to nearest."""
    view = bench.view(index, bench.stored(index))
    view.initialize(ChannelStatistics())
    return TunedBlock(TUNING, view, bench.runner(index, view))


def check(folder: str, home: torch.device) -> None:
    """All that a block keeps of its steps is where it lives."""
    blocks, moved = tune(folder, home)
    assert (0.8 < moved < 1.1) if home.type == HOST else moved < 0.1, moved
    for block in blocks:
        moments = [each for state in block._moments for each in state.values()]
        offsets = [each.offsets for each in block.positions.values()]
        assert len(moments) == 3 * len(block.factors) and offsets
        kept = [*moments, *offsets, *block.factors.values()]
        assert {each.device for each in kept} == {home}, folder


if __name__ == "__main__":
    pretended.begin()
    for each in sys.argv[1:]:
        for place in (HOST, DEVICE):
            check(each, torch.device(place))
