"""A whole model over several places: the numbers of one that lies on one device."""

from __future__ import annotations

import dataclasses
import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lrquant
from lrquant import LRQuantError
from lrquant.blocks import placement
from lrquant.blocks.materialize import materialize
from lrquant.blocks.placement import fits_device, is_in, placed, placement_of, whole_bytes
from lrquant.blocks.plan import Plan
from lrquant.blocks.variants import unlearned
from lrquant.config.scheme import Scheme
from lrquant.config.schemes import Schemes
from lrquant.measures.harness.scores import _wrapped
from lrquant.measures.measure import WholeModel

TWO_DEVICES = Path(__file__).with_name("two_devices.py")
FAMILIES = (
    "llama",
    "gemma4",
    "qwen3_next-experts",
    "granitemoehybrid",
    "gpt_oss",
    "opt",
    "mixtral",
)


@pytest.fixture
def make_rounded(make_model, make_bench, tiny_tokenizer, tmp_path, monkeypatch):
    """make_rounded(name) -> a workbench under W4A4, with a folder for what is on the disk."""
    pytest.importorskip("accelerate", reason="needs the extra lrquant[eval]")
    monkeypatch.setattr(placement, "_MAKING", 0)  # more than the tiny models have

    def make(name):
        bench = make_bench(make_model(name), plan=Plan(Schemes(Scheme(4, 4))))
        model = dataclasses.replace(bench.model, tokenizer=tiny_tokenizer)
        return dataclasses.replace(bench, model=model, scratch=tmp_path)

    return make


def room_for(bench, blocks):
    """Bytes for so many blocks beside what else is kept in memory."""
    outer, sizes = whole_bytes(bench.model, bench.dtype)
    return {"cpu": outer + sum(list(sizes.values())[:blocks])}


def answers(module, ids):
    """Logits, and what is generated."""
    written = module.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    return module(ids).logits, written


@torch.no_grad()
@pytest.mark.parametrize("blocks", [0, 1])
@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_on_the_disk_compute_the_same(make_rounded, token_ids, tmp_path, name, blocks):
    bench, ids = make_rounded(name), token_ids(2, 12)
    expected = answers(materialize(bench, unlearned(bench)), ids)
    module = materialize(bench, unlearned(bench), room_for(bench, blocks))
    names = [bench.model.block_name(index) for index in range(len(bench.model.blocks))]
    away = {n.rpartition(".")[0] for n, tensor in module.named_parameters() if tensor.is_meta}
    for index, block in enumerate(names):
        assert any(is_in(path, block) for path in away) == (index >= blocks)
    assert all(any(is_in(path, block) for block in names) for path in away)
    assert list(tmp_path.glob("whole-*/*.dat")) and module.device.type == "cpu"
    assert all(map(torch.equal, answers(module, ids), expected))
    del module
    gc.collect()
    assert not list(tmp_path.iterdir()), "what was on the disk is gone with the model"


@torch.no_grad()
def test_bytes_are_those_of_the_whole_model(make_rounded, make_model, make_bench):
    for name in ("llama", "opt", "gpt_oss"):
        bench = make_bench(make_model(name), torch.bfloat16)
        outer, blocks = whole_bytes(bench.model, bench.dtype)
        tensors = materialize(bench, unlearned(bench)).state_dict().values()
        exact = sum(tensor.numel() * tensor.itemsize for tensor in tensors)
        assert outer + sum(blocks.values()) == pytest.approx(exact, rel=0.02)


def test_a_model_over_two_places_is_scored_alike(make_rounded, tmp_path):
    lm_eval = pytest.importorskip("lm_eval", reason="needs the extra lrquant[eval]")
    bench, scores = make_rounded("llama"), []
    for room in (None, room_for(bench, 1)):
        module = materialize(bench, unlearned(bench), room)
        asked = _wrapped(WholeModel(module, bench.model, "quantized"), "2", "auto")
        pairs = [(f"{n} and one is", f" {n + 1}") for n in range(5)]
        requests = [lm_eval.api.instance.Instance("loglikelihood", {}, each, 0) for each in pairs]
        scores.append(asked.loglikelihood(requests))
    assert scores[0] == scores[1]


def test_blocks_are_placed_in_their_order():
    blocks = {"a": 4, "b": 4, "c": 6, "d": 4, "e": 4}
    assert placed(blocks, {0: 100, "cpu": 100}) == dict.fromkeys("abcde", 0)
    assert placed(blocks, {0: 9, 1: 9, "cpu": 5}) == {
        **{"a": 0, "b": 0, "c": 1, "d": "cpu", "e": "disk"}
    }
    assert placed(blocks, {0: -3, 1: 3, "cpu": 8}) == {
        **{"a": "cpu", "b": "cpu", "c": "disk", "d": "disk", "e": "disk"}
    }


def test_what_fits_is_not_taken_apart(make_rounded, caplog):
    bench = make_rounded("llama")
    assert fits_device(bench) and not fits_device(bench, 2**60)
    assert placement_of(bench) is None and placement_of(bench, {"cpu": 2**40}) is None
    with caplog.at_level("INFO", logger="lrquant"):
        placement_of(bench, room_for(bench, 1))
    assert "GB: 1 blocks on the host, 1 blocks on the disk" in caplog.text


def test_a_device_that_is_too_small_for_anything_is_refused(make_rounded):
    bench = make_rounded("llama")
    with pytest.raises(LRQuantError, match=r"GB on cuda:0 at least, .* use --device cpu"):
        placement_of(bench, {0: 10, "cpu": 2**40})


def test_without_accelerate_one_line_says_so(make_rounded, monkeypatch):
    bench = make_rounded("llama")
    monkeypatch.setattr(placement.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LRQuantError, match=r"pip install 'lrquant\[eval\]', whose accelerate"):
        materialize(bench, unlearned(bench), room_for(bench, 1))
    assert materialize(bench, unlearned(bench)) is not None


def test_no_operation_mixes_two_devices(model_folder):
    """On two pretended devices, of which each block has one; also what hooks apply is there."""
    pytest.importorskip("accelerate", reason="needs the extra lrquant[eval]")
    names = ("llama", "opt", "gemma3", "gemma4-plain", "olmo2", "gpt_neox")
    words = [sys.executable, str(TWO_DEVICES), *(str(model_folder(name)) for name in names)]
    places = Path(lrquant.__file__).parents[1], TWO_DEVICES.parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, places))}
    ended = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
