"""Blocks that live on the host while they are tuned: the bytes of those that live on the device.

A copy is made between the devices "cpu" and "cpu:0", which compute alike.  That no operation has
tensors of two devices is held by devices that are pretended, without values.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lrquant
from lrquant.blocks import workbench
from lrquant.blocks.plan import Plan
from lrquant.blocks.tuned import TunedBlock, tuned_bytes
from lrquant.blocks.workbench import shape_view
from lrquant.config.config import Config
from lrquant.config.groups import Learning
from lrquant.config.scheme import Scheme
from lrquant.config.schemes import Schemes
from lrquant.data.feeds import Feed
from lrquant.ingredients.base.statistics import ChannelStatistics
from lrquant.ingredients.tuning import Tuning
from lrquant.learn.model import learn_model
from lrquant.runs.folder import RunFolder
from lrquant.runs.progress import Progress

TWO_DEVICES = Path(__file__).with_name("tuned_on_two_devices.py")
HOST, DEVICE = torch.device("cpu"), torch.device("cpu:0")
IDENTITY = {"model": "m", "scheme": "s", "learning": {}, "data": {}, "precision": "float32"}
TUNING = Tuning(tune=True, tune_lr=0.02, tune_epochs=2, tune_rounding_lr=0.05)


@pytest.fixture
def tuned(make_model, make_bench, token_ids, tmp_path):
    """tuned(family, rounding, offload) -> the record, and the bytes of all that is kept."""

    def tune(family, rounding, offload):
        tuning = dataclasses.replace(TUNING, tune_rounding=rounding)
        bench = make_bench(make_model(family), plan=Plan(Schemes(Scheme(2, 8, 16)), (tuning,)))
        bench = dataclasses.replace(bench, device=DEVICE, offload=offload)
        path = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        folder = RunFolder.create(path, Config(model="m", output_dir=str(path)), IDENTITY)
        samples = Feed.of_tokens(token_ids(10, 12))
        learn_model(bench, Learning(0, batch_size=3), samples, None, folder, Progress(), False)
        stage = folder.stage("tuned")
        files = sorted((folder.path / "tuned" / "model").iterdir())
        return stage.about(0)["record"], [path.read_bytes() for path in files]

    return tune


@pytest.fixture
def computing(monkeypatch):
    """How many blocks live on the host and compute as copies; none computes where it lives."""
    copies = []
    made, call, step = TunedBlock.on, TunedBlock.__call__, TunedBlock.step

    def on(self, device):
        other = made(self, device)
        if other is not self:
            assert (self.device, other.device) == (HOST, DEVICE)
            copies.append(other)
        return other

    def on_the_device(self, *arguments):
        assert self.device == DEVICE
        return call(self, *arguments)

    def stepped(self):
        assert self.device == DEVICE
        step(self)

    monkeypatch.setattr(TunedBlock, "on", on)
    monkeypatch.setattr(TunedBlock, "__call__", on_the_device)
    monkeypatch.setattr(TunedBlock, "step", stepped)
    return copies


@pytest.mark.parametrize("family", ["llama", "gemma4", "qwen3_moe"])
@pytest.mark.parametrize("rounding", [False, True])
def test_the_bytes_are_those_of_blocks_on_the_device(tuned, computing, family, rounding):
    before = tuned(family, rounding, "device")
    moved = len(computing)
    assert tuned(family, rounding, "host") == before and before[0]["best_epoch"] > 0
    assert moved == len(before[1]) < len(computing)
    held = before[0]["held"]
    kept = 1 + sum(each < min(held[:epoch]) for epoch, each in enumerate(held) if epoch)
    # Forward and back once a step (3 an epoch), once over what is held, and to be kept
    assert len(computing) - moved == len(before[1]) * (2 * 3 * 2 + len(held) + kept)


@pytest.mark.parametrize("lost", ["factors", "offsets", "moments"])
def test_what_a_step_changes_and_is_lost_is_seen(tuned, monkeypatch, lost):
    expected, take = tuned("llama", True, "device"), TunedBlock.take

    def take_but(self, stepped):
        if lost == "moments":
            stepped._moments = [{} for _ in stepped.factors]
        if lost == "factors":
            stepped.factors = self.factors
        if lost == "offsets":
            stepped.positions = self.positions
        take(self, stepped)

    monkeypatch.setattr(TunedBlock, "take", take_but)
    assert tuned("llama", True, "host") != expected


@pytest.mark.parametrize("rounding", [False, True])
def test_what_a_block_takes_is_counted(make_model, make_bench, rounding):
    tuning = dataclasses.replace(TUNING, tune_rounding=rounding)
    plan = Plan(Schemes(Scheme(4, 16, 16)), (tuning,))
    bench = make_bench(make_model("llama"), plan=plan)
    view = bench.view(0, bench.stored(0))
    view.initialize(ChannelStatistics())
    block = TunedBlock(tuning, view, bench.runner(0, view))
    block.begin(2)
    for factor in block.factors.values():
        factor.grad = torch.ones_like(factor)
    for positions in block.positions.values():
        positions.gradient = torch.ones_like(positions.offsets)
    block.step()
    moments = [each for state in block._moments for each in state.values() if each.dim()]
    matrices = block.frozen.matrices.values()
    own = [*(m.codes for m in matrices), *(m.scale for m in matrices)]
    own += [*(m.zero_point for m in matrices), *block.frozen.others.values(), *moments]
    own += [each for p in block.positions.values() for each in (p.offsets, p.zero_point)]
    own += [*block.factors.values(), *tuning.kept(block.parameters).values()]
    counted = tuned_bytes(shape_view(bench.model, 0, plan), tuning)
    assert counted == pytest.approx(sum(each.nbytes for each in own), rel=0.01)


def test_where_blocks_live(make_model, make_bench, monkeypatch):
    """On a GPU where they take less than half of what will be free, or as is said."""
    bench = make_bench(make_model("llama"))
    assert bench.home(1) == HOST and dataclasses.replace(bench, offload="device").home(1) == HOST
    gpu = torch.device("cuda")
    monkeypatch.setattr(workbench, "free_memory", lambda device: 100)

    def home(offload, *needed):
        return dataclasses.replace(bench, device=gpu, offload=offload).home(*needed)

    assert home("auto", 49) == home("auto", 29, 40) == home("device", 200) == gpu
    assert home("auto", 51) == home("auto", 31, 40) == home("host", 1) == home("disk", 1) == HOST


def test_no_operation_mixes_two_devices(model_folder):
    """Steps and what is kept of them, of blocks that live on the host and on the device."""
    names = ("llama", "opt", "gemma4")  # which hands on keys and values
    words = [sys.executable, str(TWO_DEVICES), *(str(model_folder(name)) for name in names)]
    places = Path(lrquant.__file__).parents[1], TWO_DEVICES.parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, places))}
    ended = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
