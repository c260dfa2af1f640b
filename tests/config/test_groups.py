"""Groups of settings: each value is that of one setting, whatever it is called there."""

from __future__ import annotations

import dataclasses

import pytest

from lrquant.config import groups
from lrquant.config.config import Config, measured_settings
from lrquant.config.groups import Adapting, Learning, Places, StatisticsFiles

PICKED = (
    *("Computing", "Learning", "Adapting", "Sources", "Calibrating", "StatisticsFiles"),
    "Places",
)


@pytest.mark.parametrize("name", PICKED)
def test_every_value_is_that_of_a_setting(name):
    kind, config = getattr(groups, name), Config(model="m", scheme="W4A4").resolved()
    group = config.group(kind)
    for entry in dataclasses.fields(kind):
        setting = entry.metadata.get(groups.SETTING, entry.name)
        assert getattr(group, entry.name) == getattr(config, setting)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(group, dataclasses.fields(kind)[0].name, None)


def test_a_value_may_be_called_otherwise_than_its_setting():
    config = Config(wd=0.5, tta_blocks=3, tta_epochs=7, act_shifts="shifts.pt")
    assert config.group(Learning).weight_decay == 0.5
    assert config.group(Adapting) == Adapting(blocks=3, epochs=7)
    assert config.group(StatisticsFiles).named == ("shifts.pt",)


def test_what_a_checkpoint_tells_of_its_run():
    config = Config(model="some/model", scheme="W4A4", seed=5, output_dir="run").resolved()
    origin = config.origin
    assert (origin.net_name, origin.seed, origin.settings) == ("model", 5, config.to_yaml())
    assert origin.learning == config.group(Learning)
    assert origin.places == config.group(Places) and origin.places.output_dir == "run"


def test_measures_are_told_their_own_settings():
    measuring = Config(ppl=("c4",)).measuring
    assert measuring.keys() == set(measured_settings())
    assert [each.ppl for kind, each in measuring.items() if "ppl" in vars(each)] == [("c4",)]


def test_a_tower_without_a_scheme_learns_nothing():
    plain = Config(scheme="W4A4").resolved().quantizing
    tower = Config(scheme="W4A4", vision_scheme="W8A8").resolved().quantizing
    assert plain.ingredients and plain.tower_ingredients == ()
    assert tower.tower_ingredients and tower.schemes.tower is not None
