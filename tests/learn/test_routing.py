"""Experts that few tokens reach: what is counted, what stays as it starts, what the report says."""

from __future__ import annotations

import json
import logging
import re

import pytest
import torch
from torch import nn

from lrquant import quantize
from lrquant.learn.routing import Routing
from lrquant.reports.inspection import inspect_folder

MODULE = "mlp.experts"
SETTINGS = {"precision": "float32", "epochs": 2, "lwc": True, "let": True, "lr_plus": True}
SETTINGS |= {"let_init": 1.0}  # the best of several would depend on what came before the block


@pytest.fixture
def lopsided(make_model):
    """A model whose last expert is hardly chosen: its router gives it low scores."""
    model = make_model("qwen3_moe")
    for layer in model.model.layers:
        layer.mlp.gate.weight[3] -= 3 * layer.mlp.gate.weight.std()
        layer.post_attention_layernorm.weight.abs_()
        layer.mlp.gate.weight[3] = -layer.mlp.gate.weight[:3].sum(0)
    return model


def counted(model: nn.Module, ids: torch.Tensor) -> list[list[int]]:
    """Tokens of each expert of each block, by hooks on the model itself."""
    counts: list[list[int]] = []
    handles = [
        layer.mlp.gate.register_forward_hook(
            lambda module, inputs, output: counts.append(
                output[2].flatten().bincount(minlength=4).tolist()
            )
        )
        for layer in model.model.layers
    ]
    model(ids)
    for handle in handles:
        handle.remove()
    return counts


def test_few_tokens_leave_an_expert_at_its_start(lopsided, token_ids, tmp_path, caplog):
    ids = token_ids(3, 16)
    expected = counted(lopsided, ids)
    fewest = sorted(expected[1])[1]
    assert min(expected[1]) < fewest
    caplog.set_level(logging.INFO, "lrquant")
    runs = {
        tokens: quantize(
            lopsided,
            "W4A4",
            calibration=ids,
            output_dir=str(tmp_path / str(tokens)),
            expert_tokens=tokens,
            **SETTINGS,
        )
        for tokens in (0, fewest, 60_000)
    }
    start = quantize(
        lopsided,
        "W4A4",
        calibration=ids,
        output_dir=str(tmp_path / "start"),
        expert_tokens=0,
        **{**SETTINGS, "epochs": 0},
    ).folder
    learned = {tokens: run.folder.load_block(1) for tokens, run in runs.items()}
    before = start.load_block(1)
    for name in ("lwc.{}.upper", "rotation.{}.output", "let.{}.scale"):
        for expert, tokens in enumerate(expected[1]):
            own = name.format(f"{MODULE}.{expert}.down_proj")
            for few, parameters in learned.items():
                value = before.get(own, torch.ones_like(parameters[own]))  # factors start at 1
                same = torch.equal(parameters[own], value)
                assert same == (tokens < few), (own, few, "kept the start" if same else "learned")
    norm = "let.post_attention_layernorm.scale"
    assert not any(torch.equal(each[norm], before[norm]) for each in learned.values())
    assert "4 of 4 experts get fewer than 60000 tokens and keep their start" in caplog.text
    figures = runs[fewest].folder.load_diagnostics(1)[0]["experts"][MODULE]
    assert figures["tokens"] == expected[1]
    assert figures["kept_start"] == sum(tokens < fewest for tokens in expected[1])
    assert 0 <= figures["changed"] < 0.5
    report = (tmp_path / str(fewest) / "report.md").read_text()
    row = next(line for line in report.splitlines() if re.match(r"\| 1 +\| mlp.experts", line))
    assert str(min(expected[1])) in row.split()[7] and "choices changed" in report
    contents = json.loads((tmp_path / str(fewest) / "report.json").read_text())
    owners = contents["blocks"][1]["parameters"]["clipping"]
    assert f"{MODULE}.*.down_proj" in owners, "all experts' together"
    assert not any(f"{MODULE}.0" in owner for owner in owners) and "self_attn.q_proj" in owners
    assert "finished" in inspect_folder(tmp_path / str(fewest))


def test_choices_that_differ_are_counted(make_bench, make_model):
    bench = make_bench(make_model("qwen3_moe"))
    view = bench.view(0, bench.stored(0))
    routing = Routing()
    routing.see(view, None, MODULE, torch.tensor([[0, 1], [1, 2]]))
    routing.see(view, torch.tensor([[0.0, 2.0]]), MODULE, torch.tensor([[3, 0], [0, 1]]))
    assert routing.counts[MODULE].tolist() == [2, 3, 1, 0], "a token of weight 0 is not counted"
    assert routing.starved(view, 0) == frozenset()
    few = routing.starved(view, 2)
    own = {name for name in view.matrices if f"{MODULE}.2." in name or f"{MODULE}.3." in name}
    assert few == own and len(own) == 6
    others = {MODULE: [torch.tensor([[1, 0], [1, 3]]), torch.tensor([[2, 1], [0, 1]])]}
    figures = routing.figures(others, few)[MODULE]
    assert figures == {"tokens": [2, 3, 1, 0], "kept_start": 2, "changed": 3 / 8}
    doubled = routing.merged(lambda counts: [counts, counts])
    assert doubled.counts[MODULE].tolist() == [4, 6, 2, 0]
