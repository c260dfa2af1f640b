"""The probe: one block is read and learned at the run's own batch and length, nothing is kept."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lrquant import LRQuantError
from lrquant.blocks.plan import Plan
from lrquant.config.config import Config
from lrquant.config.groups import Learning
from lrquant.preflight import probe
from lrquant.preflight.load import language_load
from lrquant.preflight.probe import LONGEST, REPEATS, probe_block


def load_of(bench, config):
    """What the blocks of a bench are to learn on, under the plan of settings."""
    bench = dataclasses.replace(bench, plan=Plan.of(config.quantizing))
    return language_load(bench, config.group(Learning), None, [config.seqlen] * config.nsamples)


@pytest.fixture
def watched(make_bench, make_model):
    """A workbench whose weights say which of them were read."""

    def make(family="llama"):
        bench = make_bench(make_model(family))
        read = []

        class Source(type(bench.model.source)):
            def __init__(self, source):
                self._tensors, self.origin = source._tensors, source.origin

            def tensor(self, name):
                read.append(name)
                return super().tensor(name)

        model = dataclasses.replace(bench.model, source=Source(bench.model.source))
        return dataclasses.replace(bench, model=model), read

    return make


def config_of(**settings):
    return Config(**{"scheme": "W4A4", "nsamples": 4, "seqlen": 16, **settings}).resolved()


@pytest.mark.parametrize("family", ["llama", "qwen2-alternating", "opt", "opt-post-norm"])
def test_no_other_block_is_read(watched, family):
    bench, read = watched(family)
    costs = probe_block(load_of(bench, config_of()))
    prefix = bench.model.block_name(0) + "."
    assert read and all(name.startswith(prefix) for name in read)
    assert set(read) == {prefix + name for name in bench.model.blocks[0].state_dict()}
    parts = dataclasses.asdict(costs)
    assert all(value > 0 for value in parts.values()), parts


@pytest.mark.parametrize("window", [1, 2])
def test_another_block_is_probed_in_its_place(watched, window):
    bench, read = watched()
    costs = probe_block(load_of(bench, config_of(window=window)), 1)
    assert costs.step > 0 and read
    assert all(name.startswith(bench.model.block_name(1) + ".") for name in read)


def test_it_runs_the_settings_of_the_run(watched, monkeypatch):
    """Batch, length, scheme, branches and loss reach the learning step as a run would have them."""
    bench, _ = watched()
    seen = []
    step = probe.learning_step

    def spy(view, runner, data, batch, optimizer, objective, kind):
        seen.append(
            (
                [batch.shape for batch in data.entry.batches],
                set(view.plan.schemes.values()),
                len(data.targets),
                kind,
                view.parameters,
            )
        )
        return step(view, runner, data, batch, optimizer, objective, kind)

    monkeypatch.setattr(probe, "learning_step", spy)
    config = config_of(batch_size=3, lr_plus=True, loss="nlc", group_size=16)
    costs = probe_block(load_of(bench, config))
    assert len(seen) == 1 + REPEATS
    shape, scheme, targets, kind, parameters = seen[0]
    assert (shape, targets, kind) == ([(1, 16)] * 3, 2, "nlc")
    assert scheme == {config.quantization}
    assert {name.split(".")[0] for name in parameters} == {"let", "lwc", "rotation"}
    assert costs.streams == 3 * 3 * 16 * 32 * 4


def test_a_batch_is_not_larger_than_the_samples(watched):
    bench, _ = watched()
    costs = probe_block(load_of(bench, config_of(batch_size=8, nsamples=2)))
    assert costs.streams == 2 * 2 * 16 * 32 * 4


@pytest.mark.parametrize("settings", [{"epochs": 0}, {"scheme": "W16A16"}])
def test_nothing_to_learn_takes_no_step(watched, settings):
    bench, _ = watched()
    assert probe_block(load_of(bench, config_of(**settings))).step == 0


def test_long_steps_are_not_repeated(monkeypatch):
    """Seconds come from a clock that the test turns."""
    now = [0.0]
    monkeypatch.setattr(probe.time, "perf_counter", lambda: now[0])
    clock = probe.Clock(torch.device("cpu"))
    calls = []

    def takes(*durations):
        left = list(durations)
        calls.clear()

        def function():
            calls.append(left.pop(0))
            now[0] += calls[-1]

        return function

    assert clock.repeated(takes(5.0, 1.0, 3.0, 2.0)) == 2.0, "the first call warms up"
    assert clock.repeated(takes(LONGEST + 1, 0.0)) == LONGEST + 1 and len(calls) == 1
    compiling = probe.Clock(torch.device("cpu"), compiled=True)
    assert compiling.repeated(takes(10 * LONGEST, LONGEST + 1, 0.0)) == LONGEST + 1
    assert clock.repeated(takes(4.0, 5.0, 4.0, 0.0)) == 4.5 and len(calls) == 3


def test_a_step_that_does_not_fit(watched, monkeypatch):
    def fails(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr(probe, "learning_step", fails)
    bench, _ = watched()
    with pytest.raises(LRQuantError, match=r"a step on 1 x 16 tokens .*; use a smaller --batch"):
        probe_block(load_of(bench, config_of()))
