"""Windows: one block is learning as it is, several are learned by the error after the last."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lrquant import LRQuantError, quantize
from lrquant.blocks.inputs import BlockInputs
from lrquant.blocks.plan import Plan, learned_by
from lrquant.blocks.workbench import advance_full_precision
from lrquant.config.groups import Learning
from lrquant.config.scheme import Scheme
from lrquant.config.schemes import Schemes
from lrquant.ingredients.base.statistics import ChannelStatistics
from lrquant.learn.block_data import BlockData
from lrquant.learn.fit import fit_block
from lrquant.learn.stage import units_of
from lrquant.learn.window import Step, Window

SLOW = {"lwc_lr": 2e-3, "let_lr": 1e-3}
PLAN = Plan(Schemes(Scheme(3, 16, 16)), learned_by(lwc=True, let=True, **SLOW))


@pytest.fixture
def window(make_model, make_bench, token_ids):
    """window(count) -> a window of so many blocks, ready to be learned, and its samples."""

    def make(count: int, **changes):
        bench = dataclasses.replace(make_bench(make_model("llama", **changes)), plan=PLAN)
        entry = BlockInputs(bench.model, token_ids(3, 12), 1, bench.device)
        inputs, target = bench.streams(entry, 2)
        entry.embed(inputs)
        target.copy(inputs)
        views = []
        for index in range(count):
            statistics, stored = ChannelStatistics(), bench.stored(index)
            observe = statistics.observe
            advance_full_precision(bench, index, stored, entry, target, target, observe)
            view = bench.view(index, stored)
            view.initialize(statistics)
            views.append(view)
        runners = [bench.runner(index, view) for index, view in enumerate(views)]
        return Window(0, views, runners), BlockData(0, entry, inputs, (target,), count)

    return make


def test_a_window_of_one_is_a_block_bit_for_bit(window):
    (one, data), (other, same) = window(1), window(1)
    (view,), (runner,) = one.views, one.runners
    with runner:
        report = fit_block(view, runner, dataclasses.replace(data), Learning(3))
    with other:
        reported = fit_block(other, other, same, Learning(3))
    assert report.epoch_losses == reported.epoch_losses
    assert other.parameters.keys() == {f"0.{name}" for name in view.parameters}
    assert all(torch.equal(t, other.parameters[f"0.{n}"]) for n, t in view.parameters.items())


def test_blocks_learned_together_lower_the_error_after_the_last(window):
    together, data = window(2)
    with together:
        report = fit_block(together, together, data, Learning(12, keep_best=True))
    assert min(report.held_losses) < report.initial_loss
    with together, torch.no_grad():
        joint = float(data.terms(together, together.tensors(), "mse+nlc").sum())
        frozen = float(data.terms(together, together.frozen_tensors(), "mse+nlc").sum())
    assert joint == frozen == min(report.held_losses)
    assert not any(parameter.requires_grad for parameter in together.parameters.values())


def test_each_block_of_a_window_attends_at_its_own_bits(make_model, make_bench, token_ids):
    plan = Plan(Schemes(Scheme(8, 8), (("layers.1", Scheme(2, 2)),)))
    bench = dataclasses.replace(make_bench(make_model("llama")), plan=plan)
    entry = BlockInputs(bench.model, token_ids(1, 12), 1, bench.device)
    (stream,) = bench.streams(entry, 1)
    entry.embed(stream)
    views = [bench.view(index, bench.stored(index)) for index in (0, 1)]
    runners = [bench.runner(index, view) for index, view in enumerate(views)]
    states = inputs = stream.read(entry.batches[0], 0)
    with torch.no_grad():
        for index, view in enumerate(views):
            with bench.runner(index, view) as runner:
                states = runner(view.frozen_tensors(), states, entry.arguments(0, index))
        with Window(0, views, runners) as together:
            steps = [Step(entry.arguments(0, index), None) for index in (0, 1)]
            joint = together(together.frozen_tensors(), inputs, steps)
    assert torch.equal(joint, states)


def test_a_window_names_the_block_that_is_not_finite(window):
    together, data = window(2)
    together.views[1].stored["mlp.down_proj.weight"][0, 0] = float("nan")
    with together, pytest.raises(LRQuantError, match=r"block 1: mlp\.down_proj\.weight holds"):
        fit_block(together, together, data, Learning(1))
    together, data = window(2)
    together.views[1].stored["mlp.up_proj.weight"].mul_(1e30)
    together.views[1].stored["mlp.gate_proj.weight"].mul_(1e30)
    with (
        together,
        pytest.raises(LRQuantError, match=r"block 1: the input of mlp\.down_proj is not"),
    ):
        fit_block(together, together, data, Learning(1))


def test_units_cover_all_blocks():
    assert units_of(5, 2) == [range(0, 2), range(2, 4), range(4, 5)]
    assert units_of(3, 1) == [range(0, 1), range(1, 2), range(2, 3)]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_of_windows_is_resumed_byte_for_byte(make_model, token_ids, tmp_path, precision):
    module = make_model("llama", num_hidden_layers=5)

    def run(place, **settings):
        return quantize(
            module,
            "W3A4",
            calibration=token_ids(3, 12),
            output_dir=str(tmp_path / place),
            **{"epochs": 1, "window": 2, "lr_plus": True, "precision": precision},
            **settings,
        )

    whole = run("run")
    assert [record.block for record in whole.records] == list(range(5))
    assert whole.records[0].final_loss == whole.records[1].final_loss, "one window, one loss"
    blocks = sorted((tmp_path / "run" / "blocks").iterdir())
    before = [path.read_bytes() for path in blocks]
    assert len(list((tmp_path / "run" / "diagnostics").iterdir())) == 5, "figures of each"
    blocks[3].unlink()  # its window began with block 2, which is learned again with it
    run("run", resume=str(tmp_path / "run"))
    assert [path.read_bytes() for path in blocks] == before
    single = quantize(
        module,
        "W3A4",
        calibration=token_ids(3, 12),
        output_dir=str(tmp_path / "single"),
        **{"epochs": 1, "lr_plus": True, "precision": precision},
    )
    assert single.folder.load_block(1).keys() == whole.folder.load_block(1).keys()
    assert not all(
        torch.equal(t, single.folder.load_block(1)[n])
        for n, t in whole.folder.load_block(1).items()
    )
