"""What steps read is on its way before they begin; streams of CUDA are stood in for."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from lrquant.blocks.streams import Stream
from lrquant.config.groups import Learning
from lrquant.learn import ahead
from lrquant.learn.block_data import BlockData
from lrquant.learn.fit import fit_block

STEPS = 4  # of the block, a sample each


@pytest.fixture
def told(monkeypatch):
    """What is asked of CUDA's streams, and read, in order."""
    said = []

    class Line:
        def __init__(self, device=None, name="aside"):
            self.name = name

        def wait_stream(self, other):
            said.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def on(line):
        said.append(f"on {line.name}")
        yield
        said.append("back")

    fed_to = BlockData.fed_to

    def read(data, step):
        said.append(f"read {step}")
        return fed_to(data, step)

    monkeypatch.setattr(torch.cuda, "Stream", Line)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Line(name="main"))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(BlockData, "fed_to", read)
    return said


def test_on_the_device_each_step_reads_when_it_begins(block, told):
    _, _, data = block()
    for step, _ in enumerate(ahead.feeds_of(data)):
        told.append(f"step {step}")
    assert told == [f"{what} {step}" for step in range(STEPS) for what in ("read", "step")]


def test_from_the_host_the_next_step_s_are_read_while_one_is_computed(block, told, monkeypatch):
    """Its memory may be that of a step before, all of which was launched when it is waited for."""
    monkeypatch.setattr(Stream, "on_host", True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda states: states)
    _, _, data = block()
    for step, _ in enumerate(ahead.feeds_of(data)):
        told.append(f"step {step}")
    reads = [["aside waits for main", "on aside", f"read {step}", "back"] for step in range(STEPS)]
    expected = reads.pop(0)
    for step in range(STEPS):
        expected += ["main waits for aside", *(reads.pop(0) if reads else []), f"step {step}"]
    assert told == expected


def test_what_is_learned_is_the_same(block, told, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda states: states)
    results = []
    for host in (False, True):
        monkeypatch.setattr(Stream, "on_host", host)
        view, runner, data = block()
        with runner:
            report = fit_block(view, runner, data, Learning(3))
        results.append((report.epoch_losses, view.parameters))
    (losses, parameters), (others, expected) = results
    assert losses == others
    assert all(torch.equal(parameters[name], values) for name, values in expected.items())
    assert "on aside" in told
