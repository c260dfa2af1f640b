"""A whole multimodal model of which a part lies on the disk: the numbers of one in memory."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lrquant.blocks import placement
from lrquant.blocks.materialize import materialize
from lrquant.blocks.placement import whole_bytes
from lrquant.blocks.plan import Plan
from lrquant.blocks.variants import unlearned
from lrquant.config.config import Config

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
