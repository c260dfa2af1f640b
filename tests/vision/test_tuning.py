"""The end-to-end stage of models that see: pictures in front, or classes at the end."""

from __future__ import annotations

import pytest

from lrquant import quantize

SETTINGS = {"epochs": 1, "precision": "float32", "tune": True, "tune_lr": 0.01, "report": False}


@pytest.mark.parametrize(
    ("family", "tower"), [("llava", None), ("llava", "W8A8"), ("qwen2_vl", "W8A8"), ("vit", None)]
)
def test_it_is_tuned(family, tower, make_vision, make_feed, tmp_path):
    feed = make_feed(family)
    feed = feed + feed + feed
    run = quantize(
        make_vision(family),
        "W2A16",
        calibration=feed,
        output_dir=str(tmp_path / "run"),
        vision_scheme=tower,
        **SETTINGS,
    )
    record = run.folder.stage("tuned").about(0)["record"]
    assert min(record["held"]) < record["held"][0] and record["best_epoch"] > 0
    run.folder.require_finished()
