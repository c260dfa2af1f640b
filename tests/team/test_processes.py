"""Processes of torch.distributed: what they say to each other, and how they end together."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from lrquant.errors import LRQuantError
from lrquant.learn.checks import require_alike
from lrquant.model.device import choose_device
from lrquant.team.launch import Launch
from lrquant.team.processes import Ended, joined
from lrquant.team.team import ALONE, Alone

MEMBER = Path(__file__).with_name("member.py")


def test_processes_say_what_one_does(start, tmp_path):
    spec = importlib.util.spec_from_file_location("member", MEMBER)
    member = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(member)
    assert start(2, MEMBER, tmp_path, "well") == (0, [])
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one == other
    assert one["size"] == 2 and one["each"] == [{"rank": 0}, {"rank": 1}]
    assert one["first"] == "made by 0"
    assert one["sum"] == ALONE.ordered_sum(*member.rows_of(ALONE)).tolist() == [31, 8]
    assert one["of the first alone"] == [1, 1, 1]


@pytest.mark.parametrize(
    ("how", "lines"),
    [
        ("raise 1", ["lrquant: rank 1 of 2: no such thing; use another"]),
        ("raise all", ["lrquant: refused alike"]),
        ("kill", [f"lrquant: {Ended()}"]),
    ],
)
def test_all_end_and_one_says_why(start, tmp_path, how, lines):
    code, said = start(2, MEMBER, tmp_path, how)
    assert code != 0 and said == lines
    assert list(tmp_path.iterdir()) == []


def test_a_launch_is_read_of_the_environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert Launch.of_environment() == Launch()
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert Launch.of_environment() == Launch(), "not one of four without a rank"
    monkeypatch.setenv("RANK", "3")
    assert Launch.of_environment() == Launch(3, 4, 0, 4), "all on one machine"
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert Launch.of_environment() == Launch(3, 4, 1, 2)
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(LRQuantError, match="no numbers; start with torchrun"):
        Launch.of_environment()


@pytest.mark.parametrize(("name", "local_rank"), [("cuda", 2), ("auto", 3), ("cuda:1", 1)])
def test_a_device_that_processes_would_share_is_refused(monkeypatch, name, local_rank):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device(name).type == "cuda"
    for variable, value in {"RANK": local_rank, "WORLD_SIZE": 4, "LOCAL_RANK": local_rank}.items():
        monkeypatch.setenv(variable, str(value))
    assert choose_device("cpu").type == "cpu"
    with pytest.raises(LRQuantError, match="a device of its own, of which torch sees 2"):
        choose_device(name)


class Differing(Alone):
    """A team of which the second says something else."""

    def each(self, value):
        return [value, value.replace("float32", "bfloat16")]


def test_processes_that_would_round_otherwise_are_refused(make_model, make_bench):
    bench = make_bench(make_model("llama"))
    require_alike(ALONE, bench)
    with pytest.raises(LRQuantError, match=r"rank 1 computes in bfloat16, .*; rank 0 in float32"):
        require_alike(Differing(), bench)


def test_a_process_that_is_alone_joins_nothing(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with joined() as team:
        assert team is ALONE


def test_processes_that_do_not_find_each_other(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(LRQuantError, match=r"do not find each other .*MASTER_ADDR"), joined():
        pass
