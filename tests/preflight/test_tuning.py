"""What the end-to-end stage takes, on the device and where its blocks live."""

from __future__ import annotations

import collections
import dataclasses

import pytest
import torch

from lrquant.blocks import workbench
from lrquant.blocks.plan import Plan
from lrquant.blocks.workbench import Workbench, shape_view
from lrquant.config.config import Config
from lrquant.config.groups import Learning
from lrquant.config.scheme import Scheme
from lrquant.config.schemes import Schemes
from lrquant.ingredients.tuning import Tuning
from lrquant.model.loading import from_module
from lrquant.preflight import checks, tuning
from lrquant.preflight.findings import Preflight
from lrquant.preflight.load import language_load
from lrquant.preflight.tuning import TuningBytes, tuning_bytes

FREE = collections.namedtuple("Free", "available")
ROUNDING = Tuning(tune=True, tune_rounding=True)


@pytest.fixture
def load_of(make_model):
    """load_of(batch_size, processes) -> 16 samples of 16 tokens in steps of so many."""
    model = from_module(make_model("llama"))

    def make(batch_size=1, processes=1, device="cpu", offload="host"):
        plan = Plan(Schemes(Scheme(4, 16, 16)), (ROUNDING,))
        bench = Workbench(model, torch.device(device), torch.float32, offload, plan=plan)
        load = language_load(bench, Learning(1, batch_size=batch_size), None, [16] * 16)
        return dataclasses.replace(load, processes=processes)

    return make


def test_what_a_larger_step_takes(load_of):
    """What enters each block of its samples, and one sum of gradients; of a team all of its own."""
    one, four, half = (
        tuning_bytes(each, ROUNDING) for each in (load_of(), load_of(4), load_of(4, 2))
    )
    model = load_of().workbench.model
    states = (len(model.blocks) + 1) * 16 * model.state_size * 4
    assert (four.kept - one.kept, half.kept - one.kept) == (3 * states, states)
    assert one.block == four.block == half.block < one.kept / len(model.blocks)
    view = shape_view(model, 0, load_of().workbench.plan)
    alone, several, shared = (
        tuning._computed(view, load_of(processes=count), ROUNDING, batches, 16)
        for count, batches in ((1, 1), (1, 4), (2, 2))
    )
    weights, largest = tuning._weights(view), tuning._largest(view)
    assert several - alone == 4 * weights and shared - alone == 4 * weights + 12 * largest
    assert one.on_device(True) == one.working + one.block
    assert one.on_device(False) == one.working + one.kept


def test_what_is_handed_on_is_kept_and_owed(load_of):
    none, some = (tuning_bytes(load_of(4), ROUNDING, handed) for handed in (0, 10))
    assert some.kept - none.kept == some.working - none.working == 4 * 16 * 10


@pytest.mark.parametrize(
    ("offload", "apart", "on_host"),
    [("device", False, 0), ("host", True, 23), ("disk", True, 13), ("auto", True, 13)],
)
def test_where_blocks_live_they_are_counted(load_of, monkeypatch, offload, apart, on_host):
    """On a GPU of which half holds the hidden states, and half of the rest not the blocks."""
    stage, unit = TuningBytes(kept=13, block=3, working=5), 10
    monkeypatch.setattr(checks, "tuning_bytes", lambda *arguments: stage)
    monkeypatch.setattr(checks, "stream_bytes", lambda load: unit)
    monkeypatch.setattr(workbench, "free_memory", lambda device: 34)
    load, report = load_of(device="cuda", offload=offload), Preflight(Config())
    storage = load.workbench.storage(unit)
    device, found = checks._tuning_memory(report, load, ROUNDING, storage, 0)
    assert found == apart
    states = unit * (storage == "device")
    assert device == states + stage.working + (stage.block if apart else stage.kept)
    assert report.tuned_on_host == on_host


def test_on_a_cpu_all_is_in_its_memory(load_of, monkeypatch):
    monkeypatch.setattr(checks, "tuning_bytes", lambda *arguments: TuningBytes(13, 3, 5))
    monkeypatch.setattr(checks, "stream_bytes", lambda load: 10)
    report = Preflight(Config())
    for storage, needed in (("host", 28), ("disk", 18)):
        assert checks._tuning_memory(report, load_of(), ROUNDING, storage, 0) == (needed, False)
    assert report.tuned_on_host == 0


def test_blocks_that_the_host_does_not_hold_are_told(monkeypatch):
    monkeypatch.setattr(checks.psutil, "virtual_memory", lambda: FREE(10))
    report = Preflight(Config(), stream_bytes=1, tuned_on_host=20)
    checks._compare_host(report, "host", 0)
    (finding,) = report.failed
    assert finding.what == "memory" and "leave out --tune-rounding, or --tune" in finding.text
