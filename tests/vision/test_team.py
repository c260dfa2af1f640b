"""A team learns and measures models that see: also a member whose samples have no pictures."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lrquant.blocks.plan import Plan, learned_by
from lrquant.blocks.variants import as_learned
from lrquant.blocks.workbench import make_workbench
from lrquant.config.config import Config
from lrquant.config.groups import Computing, Learning
from lrquant.data.feeds import Feed
from lrquant.learn.model import learn_model
from lrquant.measures.measure import WholeModel
from lrquant.measures.scoring import answers, classes
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


def whole(module, tokenizer, team):
    module = module.eval()
    return WholeModel(module, SimpleNamespace(tokenizer=tokenizer), "quantized", team)


@pytest.mark.parametrize("size", [2, 3])
def test_members_answer_and_classify_what_one_does(
    teams, make_vision, make_feed, processor, monkeypatch, size
):
    """Samples of two shapes in batches of two; one of three members classifies none."""
    for module in (answers, classes):
        monkeypatch.setattr(module, "BATCH", 2)
    words, pictures = make_feed("llava", 5), make_feed("vit", 3)
    ids = torch.cat([words.inputs[0]["input_ids"], torch.full((1, 3), 9)], 1)
    other = {**words.inputs[0], "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    asked = [*words.inputs[:2], other, *words.inputs[2:]]
    sets = [SimpleNamespace(feed=Feed(asked)), SimpleNamespace(feed=pictures)]

    def work(team):
        answering, classifying = sets if team.rank == 0 else (None, None)
        model = whole(make_vision("llava"), processor.tokenizer, team)
        told = answers.answers("", answering, model, Progress())
        model = whole(make_vision("vit"), None, team)
        return told, classes.predictions(classifying, model, Progress()).tolist()

    alone = work(ALONE)
    assert len(alone[0]) == 6 and len(set(alone[0])) > 1 and len(alone[1]) == 3
    assert teams.together(work, size) == [alone] * size
