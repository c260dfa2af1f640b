"""The contract of an ingredient, over every one here and the one of the page."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lrquant
from lrquant.blocks.inputs import BlockInputs
from lrquant.blocks.plan import Plan
from lrquant.blocks.view import BlockView
from lrquant.blocks.workbench import advance_full_precision
from lrquant.config.groups import Learning
from lrquant.config.scheme import Scheme
from lrquant.config.schemes import Schemes
from lrquant.ingredients.base.statistics import ChannelStatistics
from lrquant.ingredients.clipping import Clipping
from lrquant.ingredients.equivalent import Equivalent
from lrquant.ingredients.factors import ScaleFactors
from lrquant.ingredients.rounding import Rounding
from lrquant.learn.block_data import BlockData
from lrquant.learn.fit import fit_block

PAGE = "add-an-ingredient.md"
OWN = {
    "clipping": Clipping(lwc=True),
    "clipping from a logit": Clipping(lwc=True, lwc_init=4.0),
    "sites": Equivalent(let=True, let_shift="always"),
    "factors, site": ScaleFactors(rotation=True, rotation_sharing="site"),
    "factors, linear": ScaleFactors(rotation=True, rotation_sharing="linear"),
    "rounding": Rounding(rounding=True),
    "factors, dense": ScaleFactors(rotation=True, rotation_sharing="weight", rotate_rank=2),
}
W2A16 = Scheme(2, 16, 16)
NAMES = pytest.mark.parametrize("name", [*OWN, "offsets"])


@pytest.fixture
def ingredient(toys):
    def make(name: str):
        if name in OWN:
            return OWN[name]
        return toys(PAGE).Offsets(offsets=True, offsets_lr=0.1)

    return make


@pytest.fixture
def prepared(make_model, make_bench, token_ids):
    """prepared(ingredient) -> view, runner and data of a block that is ready to be learned."""

    def prepare(each, scheme=W2A16):
        bench = make_bench(make_model("llama-biases"))
        bench = dataclasses.replace(bench, plan=Plan(Schemes(scheme), (each,)))
        entry = BlockInputs(bench.model, token_ids(3, 12), 1, bench.device)
        inputs, target = bench.streams(entry, 2)
        entry.embed(inputs)
        statistics = ChannelStatistics()
        stored = bench.stored(0)
        advance_full_precision(bench, 0, stored, entry, inputs, target, statistics.observe)
        view = bench.view(0, stored)
        view.initialize(statistics)
        return view, bench.runner(0, view), BlockData(0, entry, inputs, (target,))

    return prepare


def move_(view: BlockView) -> None:
    generator = torch.Generator().manual_seed(5)
    for name, values in view.parameters.items():
        view.parameters[name] = values + 0.3 * torch.rand(values.shape, generator=generator)


def frozen_differs(view: BlockView) -> list[str]:
    with torch.no_grad():
        learned = view.tensors()
    frozen = view.freeze().tensors(view.dtype)
    assert learned.keys() == frozen.keys()
    return [name for name, tensor in learned.items() if not torch.equal(tensor, frozen[name])]


@NAMES
def test_shapes_are_those_of_the_start_and_names_its_own(name, ingredient, prepared):
    each = ingredient(name)
    view, _, _ = prepared(each)
    shapes = {key: tuple(values.shape) for key, values in view.parameters.items()}
    assert shapes and shapes == each.shapes(view.shapes)
    assert all(key.startswith(f"{each.name}.") for key in shapes)
    assert all(values.dtype == torch.float32 for values in view.parameters.values())
    assert each.description and each.charts and each.rate > 0


@NAMES
def test_what_is_frozen_is_what_was_learned(name, ingredient, prepared):
    view, _, _ = prepared(ingredient(name))
    assert frozen_differs(view) == []
    move_(view)
    assert frozen_differs(view) == []


@NAMES
def test_what_is_kept_comes_back(name, ingredient, prepared):
    """Codes and all else are the same before and after what is learned is hardened and packed."""
    view, _, _ = prepared(ingredient(name))
    move_(view)
    view.constrain_()
    before = view.frozen_tensors()
    view.harden_()
    kept = {key: values.clone() for key, values in view.kept.items()}
    assert {key: tuple(values.shape) for key, values in kept.items()} == view.kept_shapes()
    view.load(kept)
    assert all(torch.equal(view.kept[key], values) for key, values in kept.items())
    after = view.frozen_tensors()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []


@NAMES
def test_learning_moves_every_parameter_and_lowers_the_loss(name, ingredient, prepared):
    view, runner, data = prepared(ingredient(name))
    before = {key: values.clone() for key, values in view.parameters.items()}
    with runner:
        report = fit_block(view, runner, data, Learning(epochs=8, keep_best=True))
    assert report.best_epoch and report.held_losses[report.best_epoch - 1] < report.initial_loss
    assert not any(torch.equal(before[key], values) for key, values in view.parameters.items())
    assert frozen_differs(view) == []


@NAMES
def test_a_constraint_holds_and_holds_twice(name, ingredient, prepared):
    view, _, _ = prepared(ingredient(name))
    move_(view)
    view.constrain_()
    once = {key: values.clone() for key, values in view.parameters.items()}
    view.constrain_()
    assert all(torch.equal(once[key], values) for key, values in view.parameters.items())


@NAMES
def test_where_nothing_is_quantised_there_is_nothing_to_round(name, ingredient, prepared):
    each = ingredient(name)
    assert (each.refusal(Schemes(Scheme(16, 16))) is None) is False
    view, _, _ = prepared(each, Scheme(16, 8))
    assert frozen_differs(view) == []


def test_two_that_give_a_weight_the_same_are_refused(ingredient, prepared):
    each = ingredient("clipping")
    view, _, _ = prepared(each)
    view.ingredients = (each, each)
    with pytest.raises(lrquant.LRQuantError, match="two ingredients give a weight its 'upper'"):
        view.tensors()


RUN = """
import sys, torch
from transformers import AutoModelForCausalLM, LlamaConfig
from lrquant import quantize
from lrquant.measures.evaluation.resolution import resolve_settings
torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                     num_attention_heads=4, num_key_value_heads=2)
model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
run = quantize(model, "W3A16g16", calibration=torch.arange(36).view(3, 12), output_dir=sys.argv[1],
               epochs=2, offsets=True, offsets_lr=0.05, report=True, precision="float32",
               **({"resume": sys.argv[1]} if sys.argv[2:] else {}))
print(run.config.to_yaml())
print(run.results["method"])
names = [name for name in run.folder.load_block(0) if name.startswith("offsets")]
print(names[0], run.records[0].final_loss < run.records[0].initial_loss)
later = {"resume": sys.argv[1], "epochs": 0, "tta_offsets_lr": 0.25, "offsets_lr": 0.75}
config, _ = resolve_settings(later)
print("measured with", config.tta_offsets_lr, config.offsets_lr)
"""


def test_a_run_with_the_one_of_the_page_is_resumed_byte_for_byte(installed, tmp_path):
    """In a process of its own: settings come with the package."""
    place = installed(PAGE)
    source = Path(lrquant.__file__).parents[1]
    paths = os.pathsep.join([str(place), str(source)])
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}

    def child(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, *words], env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout

    told = child("-c", RUN, str(tmp_path / "run"))
    assert "offsets_lr: 0.05" in told and "rounding offsets (lr 0.05)" in told
    assert "offsets.mlp.down_proj.value True" in told
    blocks = sorted((tmp_path / "run" / "blocks").iterdir())
    before = [path.read_bytes() for path in blocks]
    blocks[1].unlink()
    child("-c", RUN, str(tmp_path / "run"), "resume")
    assert [path.read_bytes() for path in blocks] == before
    assert "Learned rounding offsets" in (tmp_path / "run" / "report.html").read_text()
    assert "measured with 0.25 0.05" in told, "what was learned stays, what is afterwards is given"
    assert "--offsets-lr" in child("-m", "lrquant", "quantize", "--help-all")
    said = child("-m", "lrquant", "evaluate", "--help-all")
    assert "--tta-offsets-lr" in said and "--tta-let-lr" in said and "--offsets-lr" not in said
