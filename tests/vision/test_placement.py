"""A whole multimodal model of which a part lies on the disk: the numbers of one in memory."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import lrquant
from lrquant.blocks import placement
from lrquant.blocks.materialize import materialize
from lrquant.blocks.placement import whole_bytes
from lrquant.blocks.plan import Plan
from lrquant.blocks.variants import unlearned
from lrquant.config.config import Config
from lrquant.config.groups import Computing
from lrquant.errors import LRQuantError
from lrquant.measures.subjects.checkpoint import loaded, stored_checkpoint

CONFIG = Config(model="m", scheme="W4A8", vision_scheme="W8A8").resolved()


@torch.no_grad()
def test_blocks_of_tower_and_language_part_on_the_disk(
    make_vision, make_feed, make_bench, tmp_path, monkeypatch, family
):
    pytest.importorskip("accelerate", reason="needs the extra lrquant[eval]")
    monkeypatch.setattr(placement, "_MAKING", 0)
    settings = (
        dataclasses.replace(CONFIG, vision_scheme=None) if family in ("vit", "deit") else CONFIG
    )
    bench = make_bench(make_vision(family), plan=Plan.of(settings.quantizing))
    bench = dataclasses.replace(bench, scratch=tmp_path)
    feed = make_feed(family)
    inputs = feed.collate(feed.slices(2)[0])
    outer, sizes = whole_bytes(bench.model, bench.dtype)
    room = {"cpu": outer + next(iter(sizes.values()))}
    expected = materialize(bench, unlearned(bench))(**inputs).logits
    module = materialize(bench, unlearned(bench), room)
    away = sum(tensor.is_meta for tensor in module.parameters())
    assert away and torch.equal(module(**inputs).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize(
    ("form", "scheme", "vision"),
    [
        ("compressed-tensors", "W4A16-sym", "W8A8-sym-qkv16"),
        ("dequantized", "W4A16", "W8A16"),
        ("lrquant", "W4A4", "W8A8"),
    ],
)
def test_a_checkpoint_on_the_disk(
    language_family, form, scheme, vision, make_vision, make_feed, tmp_path, monkeypatch
):
    pytest.importorskip("accelerate", reason="needs the extra lrquant[eval]")
    monkeypatch.setattr(placement, "_MAKING", 0)
    feed, folder, cpu = make_feed(language_family), tmp_path / "saved", torch.device("cpu")
    settings = {"epochs": 0, "report": False, "precision": "float32", "seqlen": 16}
    settings |= {"save_dir": str(folder), "output_dir": str(tmp_path / "run"), "format": form}
    settings |= {"vision_scheme": vision, "activation_symmetric": form == "compressed-tensors"}
    try:
        lrquant.quantize(make_vision(language_family), scheme, calibration=feed, **settings)
    except LRQuantError as error:
        pytest.skip(str(error))
    stored = stored_checkpoint(str(folder), Computing("cpu", "float32", "auto"))
    inputs = feed.collate(feed.slices(2)[0])
    expected = loaded(stored, cpu).module(**inputs).logits
    spread = loaded(stored, cpu, tmp_path, {"cpu": stored.size.outer})
    assert list(tmp_path.glob("whole-*")) and spread.device == cpu
    assert torch.equal(spread.module(**inputs).logits, expected)
