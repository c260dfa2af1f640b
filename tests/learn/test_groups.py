"""Experts that are learned some at a time: the same bytes for all at once, less loss for some."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lrquant import quantize
from lrquant.blocks.experts import BlockTensors
from lrquant.blocks.plan import Plan, learned_by
from lrquant.blocks.view import BlockView
from lrquant.config.scheme import Scheme
from lrquant.config.schemes import Schemes
from lrquant.errors import LRQuantError
from lrquant.ingredients.ingredient import owner_of
from lrquant.learn.groups import _tell, groups_of
from lrquant.numerics.packing import unpack_ternary
from lrquant.runs.folder import RunFolder

LEARNED = {"lwc": True, "let": True, "lr_plus": True, "rounding": True, "let_init": 1.0}
SETTINGS = {"precision": "float32", "epochs": 2, "expert_tokens": 0, **LEARNED}
SCHEME = "W3A16g16"


@pytest.fixture
def learned(make_model, token_ids, tmp_path):
    """A tiny model quantised with experts in groups of so many."""

    def run(
        group: int, family: str = "qwen3_moe", name: str = "", tokens: int = 16, **more: object
    ) -> RunFolder:
        return quantize(
            make_model(family),
            SCHEME,
            calibration=token_ids(4, tokens),
            output_dir=str(tmp_path / (name or f"{family}-{group}")),
            expert_group=group,
            **{**SETTINGS, **more},
        ).folder

    return run


def records(folder: RunFolder) -> list[dict]:
    return list(map(json.loads, (folder.path / "blocks.jsonl").read_text().splitlines()))


def parameters(folder: RunFolder) -> dict[str, Tensor]:
    blocks = range(len(records(folder)))
    return {f"{i}.{n}": t for i in blocks for n, t in folder.load_block(i).items()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.mark.parametrize(
    ("family", "tokens"), [("qwen3_moe", 16), ("qwen3_moe", 1), ("mixtral", 16)]
)
def test_all_at_once_by_expert_are_the_bytes_of_all_together(learned, family, tokens):
    """Of samples of a token each, two of whose experts get none."""
    whole, by_expert = (learned(group, family, tokens=tokens) for group in (0, 4))
    assert_same(parameters(whole), parameters(by_expert))
    for before, after in zip(records(whole), records(by_expert), strict=True):
        for name in ("initial_loss", "final_loss", "epoch_losses", "held_losses", "best_epoch"):
            assert before[name] == after[name], name
    seen = [load_file(each.diagnostics_path(0)) for each in (whole, by_expert)]
    assert_same(*seen)
    assert any("learned" in name for name in seen[0])


@pytest.mark.parametrize("family", ["gpt_oss", "qwen2_moe"])
def test_all_at_once_beside_others_differ_in_the_order_of_sums_alone(learned, family):
    """A shared expert, or biases that shifts move into, also consume what the experts do."""
    whole, by_expert = learned(0, family, rounding=False), learned(4, family, rounding=False)
    torch.testing.assert_close(parameters(by_expert), parameters(whole), rtol=2e-2, atol=2e-2)
    for before, after in zip(records(whole), records(by_expert), strict=True):
        assert after["final_loss"] == pytest.approx(before["final_loss"], rel=1e-3)


def test_groups_learn_each_expert_and_err_less_than_the_start(learned):
    whole, groups = learned(0), learned(2)
    for before, after in zip(records(whole), records(groups), strict=True):
        assert len(after["epoch_losses"]) == 2 * len(before["epoch_losses"])
        assert after["final_loss"] < 0.9 * after["initial_loss"]
        assert after["final_loss"] < 1.3 * before["final_loss"]
        assert 0 < after["best_epoch"] <= len(after["epoch_losses"])
    start, end = parameters(learned(2, name="start", lwc_lr=0.0)), parameters(groups)
    moved = [name for name in end if not torch.equal(end[name], start[name])]
    for expert in range(4):
        assert [name for name in moved if name.startswith(f"0.lwc.mlp.experts.{expert}.")]
        own = [end[name] for name in end if name.startswith(f"0.rounding.mlp.experts.{expert}.")]
        assert all(unpack_ternary(packed).any() for packed in own) and len(own) == 3


@pytest.mark.parametrize("more", [{}, {"lwc": False, "rounding": False, "lr_plus": False}])
def test_others_out_of_codes_are_the_others_as_they_are(learned, monkeypatch, more):
    """Alone with scales, an expert's second matrix owns what its first is multiplied with."""
    fixed = learned(1, name="fixed", **more)
    monkeypatch.setattr(BlockView, "fix_", lambda view, matrices: None)
    assert_same(parameters(learned(1, name="made", **more)), parameters(fixed))


def test_a_run_in_groups_is_resumed_to_the_byte(learned, tmp_path):
    folder = learned(2, save_dir=str(tmp_path / "saved"), format="dequantized")  # read back
    assert "best epoch kept, 2 experts at a time" in (folder.path / "report.md").read_text()
    expected = {path.name: path.read_bytes() for path in blocks_of(folder)}
    assert len(expected) == 2
    blocks_of(folder)[-1].unlink()
    again = learned(2, resume=str(folder.path))
    assert {path.name: path.read_bytes() for path in blocks_of(again)} == expected


def blocks_of(folder: RunFolder) -> list[Path]:
    return sorted((folder.path / "blocks").glob("*.safetensors"))


def test_another_size_of_groups_is_another_run(learned):
    folder = learned(2)
    with pytest.raises(LRQuantError, match="expert_group"):
        learned(1, name=folder.path.name, resume=str(folder.path))


def test_windows_have_no_groups(learned):
    with pytest.raises(LRQuantError, match="use --window 1"):
        learned(2, window=2)


def test_progress_of_groups_begins_at_one_and_grows():
    shown = []
    groups = [frozenset()] * 3
    for number in range(3):
        for step in range(1, 5):
            _tell(lambda step, loss: shown.append(step), 4, number, groups, step, 0.0)
    assert shown == [1, 2, 3, 4]


def bench_of(make_bench, make_model, family: str, by_expert: bool):
    plan = Plan(Schemes(Scheme.parse(SCHEME)), learned_by(**LEARNED))
    return replace(make_bench(make_model(family), plan=plan), by_expert=by_expert)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_weights_made_when_used_are_those_of_all_together(make_bench, make_model, family):
    benches = [bench_of(make_bench, make_model, family, each) for each in (False, True)]
    views = [bench.view(0, bench.stored(0)) for bench in benches]
    for view in views:
        view.parameters = {
            name: torch.full(shape, 0.25) for name, shape in view.parameter_shapes().items()
        }
    for made in (lambda view: view.tensors(), lambda view: view.frozen_tensors()):
        whole, apart = (made(view) for view in views)
        assert isinstance(apart, BlockTensors) and apart.apart
        assert apart.keys() | apart.apart.keys() == whole.keys()
        assert not apart.keys() & apart.apart.keys()
        assert_same(whole, BlockTensors.whole(apart))


def test_frozen_experts_go_to_another_device_whole(make_bench, make_model):
    bench = bench_of(make_bench, make_model, "gpt_oss", True)
    view = bench.view(0, bench.stored(0))
    view.parameters = {n: torch.ones(shape) for n, shape in view.parameter_shapes().items()}
    frozen = view.freeze()
    there = frozen.on(torch.device("meta")).tensors(torch.float32)
    own = frozen.tensors(torch.float32)
    assert {tensor.device.type for tensor in there.values()} == {"meta"}
    assert {n: t.shape for n, t in there.items()} == {n: t.shape for n, t in own.items()}
    assert_same(frozen.on(torch.device("cpu")).tensors(torch.float32), own)


def test_groups_hold_each_parameter_once(make_bench, make_model):
    bench = bench_of(make_bench, make_model, "qwen3_moe", True)
    view = bench.view(0, bench.stored(0))
    shapes = view.parameter_shapes().items()
    view.parameters = {name: torch.ones(shape) for name, shape in shapes}
    view.still = frozenset(n for n in view.parameters if "mlp.experts.1." in n)
    for size, numbers in ((0, [{0, 2, 3}]), (1, [{0}, {2}, {3}]), (2, [{0, 2}, {3}])):
        groups = groups_of(view, size)
        seen = [
            {
                view.matrices[owner_of(name)].expert
                for name in group
                if owner_of(name) in view.matrices
            }
            for group in groups
        ]
        assert seen == [{None, *first} if not i else first for i, first in enumerate(numbers)]
        assert sorted(name for group in groups for name in group) == sorted(view.moving)
    assert any("layernorm" in name for name in groups[0])
