"""Whether quantizers are compiled: what is asked, what is there, and what pays."""

from __future__ import annotations

import pytest
import torch

from lrquant import LRQuantError, quantize
from lrquant.blocks.plan import Plan
from lrquant.config.groups import Learning
from lrquant.config.scheme import Scheme
from lrquant.config.schemes import Schemes
from lrquant.learn import compiling as rules
from lrquant.learn.compiling import compiling
from lrquant.model.loading import from_module
from lrquant.numerics import tokens, weights

CPU = torch.device("cpu")
PLAN = Plan(Schemes(Scheme(4)))


@pytest.fixture
def asked(make_model, monkeypatch):
    monkeypatch.setattr(rules, "why_not", lambda device: None)
    model = from_module(make_model("llama"))
    return lambda how, epochs: compiling(how, CPU, model, PLAN, Learning(epochs=epochs), 4)


def test_it_is_compiled_where_that_pays(asked):
    assert not asked("auto", 10)[0] and asked("on", 10)[0] and not asked("off", 10**9)[0]
    compiled, why = asked("auto", 10**9)
    assert compiled and "s to compile" in why


def test_without_a_compiler_it_is_not(asked, monkeypatch):
    monkeypatch.setattr(rules, "why_not", lambda device: "no C++ compiler is on the PATH")
    assert asked("auto", 10**9) == (
        False,
        "quantizers are not compiled: no C++ compiler is on the PATH",
    )
    with pytest.raises(LRQuantError, match=r"--compile on: no C\+\+ compiler"):
        asked("on", 1)


def test_a_run_says_so_and_goes_on_so_alone(make_model, token_ids, tmp_path, monkeypatch):
    """What is compiled is called through one function: here it calls what it was to compile."""
    calls = []

    def called(function, *arguments, by_size=True):
        calls.append(function.__name__)
        return function(*arguments)

    monkeypatch.setattr(rules, "why_not", lambda device: None)
    for module in (weights, tokens):
        monkeypatch.setattr(module, "call_compiled", called)

    def learn(**settings):
        return quantize(
            make_model("llama"),
            "W4A4",
            calibration=token_ids(3, 16),
            output_dir=str(tmp_path / "run"),
            **{"epochs": 1, "report": False, "precision": "float32", **settings},
        )

    run = learn(compile="on")
    assert {"_round_trip", "_gradients"} <= set(calls)
    assert run.folder.identity["compiled"] is True
    with pytest.raises(LRQuantError, match="compiled differs"):
        learn(compile="off", resume=str(tmp_path / "run"))
    calls.clear()
    learn(compile="off", overwrite=True)
    assert not calls
