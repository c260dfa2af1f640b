"""The end-to-end stage of models that see: pictures in front, or classes at the end."""

from __future__ import annotations

import pytest
import torch

from lrquant import quantize
from lrquant.blocks.plan import Plan
from lrquant.blocks.workbench import Workbench
from lrquant.config.groups import Learning
from lrquant.config.scheme import Scheme
from lrquant.config.schemes import Schemes
from lrquant.data.samples import Samples
from lrquant.ingredients.tuning import Tuning
from lrquant.model.loading import from_module
from lrquant.preflight.kinds import probe_kinds
from lrquant.preflight.load import language_load
from lrquant.preflight.tuning import transfer_seconds, tuning_bytes, tuning_seconds

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


def test_a_classifier_s_stage_is_estimated(make_vision, make_feed):
    """Its head has classes, and its rows are patches."""
    tuning = Tuning(tune=True)
    model = from_module(make_vision("vit"))
    plan = Plan(Schemes(Scheme(4, 16)), (tuning,))
    bench = Workbench(model, torch.device("cpu"), torch.float32, "host", plan=plan)
    none, told = torch.empty((0, 0), dtype=torch.long), ("pictures", "train", "", "")
    samples = Samples(none, *told, prompts=make_feed("vit", 4))
    load = language_load(bench, Learning(1), samples, [])
    assert tuning_bytes(load, tuning).kept > 0
    assert tuning_seconds(load, probe_kinds(load), tuning) > 0
    assert transfer_seconds(load, tuning, 4) > 0
