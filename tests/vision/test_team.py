"""A team learns and measures models that see: also a member whose samples have no pictures."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch

from lrquant.blocks.plan import Plan, learned_by
from lrquant.blocks.variants import as_learned
from lrquant.blocks.workbench import make_workbench
from lrquant.config.config import Config
from lrquant.config.groups import Computing, Learning
from lrquant.data.feeds import Feed
from lrquant.learn.model import learn_model
from lrquant.model.loading import from_module
from lrquant.runs.folder import RunFolder
from lrquant.runs.progress import Progress
from lrquant.team.team import ALONE

OTHER = Path(__file__).parents[1] / "learn" / "test_team.py"
CONFIG = Config(model="m", scheme="W4A8", vision_scheme="W8A8").resolved()


@pytest.fixture(scope="module")
def teams():
    """The module that has members as threads."""
    spec = importlib.util.spec_from_file_location("teams", OTHER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_the_second_of_two_has_no_picture(
    teams, make_vision, make_feed, token_ids, tmp_path, family
):
    """The tower's step is of two pictures; of the language part's the words alone are the last."""
    feed = make_feed(family) + Feed.of_tokens(token_ids(2, 12))

    def work(team, name):
        plan = Plan.of(CONFIG.quantizing)
        plan = dataclasses.replace(plan, ingredients=learned_by(lwc=True))
        bench = make_workbench(
            from_module(make_vision(family)), plan, Computing("cpu", "float32", "host")
        )
        folder = RunFolder(tmp_path / (name if team.rank == 0 else "absent"))
        if team.rank == 0:
            folder = teams.create(tmp_path / name)
        learning = Learning(1, batch_size=4, dynamic_weights=True)
        learn_model(bench, learning, feed, None, folder, Progress(), False, team=team)
        prepared = as_learned(bench, folder, team=team).tower(0)
        return {name: tensor.clone() for name, tensor in prepared.tensors.items()}

    alone = work(ALONE, "alone")
    for other in teams.together(lambda team: work(team, "run")):
        assert all(torch.equal(other[name], tensor) for name, tensor in alone.items())
    assert not (tmp_path / "absent").exists()
    folders = [RunFolder.open(tmp_path / name) for name in ("run", "alone")]
    for parts in (folders, [folder.tower for folder in folders]):
        for index in range(parts[0].finished_blocks()):
            assert teams.same(*(part.load_block(index) for part in parts))
