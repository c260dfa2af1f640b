"""The contract of a format: every one of this package, and of others that are installed."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass

import pytest
import torch
from transformers import AutoTokenizer

from lrquant import LRQuantError, quantize
from lrquant.blocks.plan import Plan
from lrquant.blocks.runner import INPUT_FACTOR_SUFFIX
from lrquant.blocks.workbench import learned_view
from lrquant.config.config import Config
from lrquant.config.core import TARGETS
from lrquant.files.manifest import MANIFEST, SETTINGS
from lrquant.formats.checkpoint import checkpoint_dtype, model_dtype, save_checkpoint
from lrquant.formats.choice import choose_format, formats
from lrquant.formats.verification import verify
from lrquant.model.loading import from_module
from lrquant.numerics.grids import grid
from lrquant.numerics.grids.grid import SMALLEST_SCALE, Grid, Scales
from lrquant.preflight.checks import preflight
from lrquant.reports.inspection import inspect_folder

FORMATS = pytest.mark.parametrize("form", formats().values(), ids=lambda form: form.name)
WIDE = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
SIZES = {"opt": {"hidden_size": 128, "ffn_dim": 192, "word_embed_proj_dim": 128}}
HALF = {"save_dtype": "bfloat16"}
SYMMETRIC = {"activation_symmetric": True}
SHIFTS = {"let": True, "let_shift": "always", "let_sites": ("norm", "value_output")}
FACTORS = {"lr_plus": True, "epochs": 1}
SOME = ("mlp.down_proj=W4A16g16-sym", "layers.0=W8A16g16-sym", "layers.1.self_attn.o_proj=W16A16")

CASES = {
    "groups": ("llama-biases", "W4A16g32", HALF),
    "small groups": ("llama", "W3A16g16-sym", HALF),
    "rows, tied": ("llama-tied", "W4A16", {}),
    "rows of opt": ("opt", "W4A16-sym", HALF),
    "bytes": ("opt", "W8A8-sym-qkv16", SYMMETRIC),
    "tokens": ("llama-biases", "W4A4", HALF),
    "eight bits": ("llama", "W8A8-sym", SYMMETRIC),
    "activations": ("llama", "W16A8", HALF),
    "floating point": ("llama-tied", "W16A16", {}),
    "shifts in biases": ("opt", "W4A16", SHIFTS),
    "mixed": ("llama", "W3A16g16-sym", {"scheme_for": SOME, **HALF}),
    "mixed with zero points": ("llama", "W4A16", {"scheme_for": ("mlp.down_proj=W8A16",)}),
    "one block left": ("llama", "W4A16", {"scheme_for": ("layers.0=W16A16",)}),
    "times Hadamard matrices": ("llama-biases", "W4A4-sym-qkv16-hadamard", SYMMETRIC),
    "some times Hadamard matrices": (
        *("llama", "W4A16g16-sym"),
        {"scheme_for": ("mlp.down_proj=W4A16g16-sym-hadamard",)},
    ),
    "mixed with tokens": ("opt", "W4A4", {"scheme_for": ("fc2=W8A8", "layers.1=W4A8g16")}),
}
HELD = {
    "shift": SHIFTS,
    "input factor": {**FACTORS, "rotation_sharing": "linear", **HALF},
    "dense factor": {**FACTORS, "rotate_rank": 2},
}


@dataclass(frozen=True)
class Doubled(Grid):
    """Every second integer: no format of integers may take its codes for its levels."""

    kind = "doubled"

    @property
    def code_range(self):
        largest = (1 << (self.bits - 1)) - 1
        return -largest, largest

    def scales(self, low, high):
        scale = torch.maximum(-low, high) / (2 * self.code_range[1])
        return Scales(scale.clamp(min=SMALLEST_SCALE), torch.zeros_like(low))

    def encode_(self, values, scales, offset=None):
        return values.div_(2 * scales.scale).round_().clamp_(*self.code_range)

    def levels_(self, codes, zero_point):
        return codes.mul_(2)

    def unclipped(self, ratios, zero_point):
        return (ratios.abs() <= 2 * self.code_range[1]).float()


@pytest.fixture
def settings_of(tmp_path, text):
    """settings_of(form, scheme, **others) -> those of a run that is written so"""
    (tmp_path / "text.txt").write_text(text)

    def make(form, scheme, **settings):
        places = {"output_dir": str(tmp_path / "run"), "save_dir": str(tmp_path / "saved")}
        data = {"calib_dataset": str(tmp_path / "text.txt"), "nsamples": 1, "seqlen": 16}
        common = {"precision": "float32", "epochs": 0, "report": False, **places, **data}
        return {**common, "scheme": scheme, "format": form.name, **settings}

    return make


@pytest.fixture
def tiny(make_model):
    def make(family, **changes):
        return make_model(family, **{**SIZES.get(family, WIDE), **changes})

    return make


@pytest.fixture
def written(tiny_tokenizer, tmp_path, tensors_of):
    """written(form, model, settings) -> the run, if all of the contract holds of its checkpoint,
    or None, if it was refused in one line before learning, and every mend that this names works.
    """

    def check(form, module, settings):
        looked_at = preflight(settings, from_module(module, tiny_tokenizer))
        failed = [finding.text for finding in looked_at.failed]
        try:
            run = quantize(module, tokenizer=tiny_tokenizer, **settings)
        except LRQuantError as error:
            assert failed == [str(error)] and not error.__cause__
            assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
            require_mended(str(error), settings, from_module(module, tiny_tokenizer))
            return None
        assert failed == []
        saved = tmp_path / "saved"
        require_as_measured(run, form, saved, tensors_of(saved))
        require_as_told(run, saved, looked_at.checkpoint)
        return run

    return check


def require_mended(said, settings, model):
    """A refusal is one line, and what it says to ask for instead gets through, in steps or at once.

    Each step asks for one thing more; formats that are said to take a run take it at once.
    """
    assert said.startswith(f"--format {settings['format']}: ") and "\n" not in said, said
    others = list(mends(said, settings))
    assert others, f"names no mend: {said}"
    for other in others:
        failed = [finding.text for finding in preflight(other, model).failed]
        if failed and other["format"] == settings["format"] and other != settings:
            require_mended(*failed, other, model)
        else:
            assert not failed, f"{said} -> {failed}"


def mends(said, settings):
    """The settings that a refusal names: of a scheme, of a pattern, of a method, of formats."""
    symmetric = settings.get("activation_symmetric") or "--activation_symmetric" in said
    for name in re.findall(r"is --scheme ([\w-]+)", said):
        yield {**settings, "scheme": name, "activation_symmetric": symmetric}
    patterns = dict(re.findall(r"--scheme-for '(.+?)=(.+?)'", said))
    if patterns:
        pairs = [pattern.split("=") for pattern in settings["scheme_for"]]
        mended = tuple(f"{pattern}={patterns.get(pattern, own)}" for pattern, own in pairs)
        yield {**settings, "scheme_for": mended, "activation_symmetric": symmetric}
    for name, value in re.findall(r"learn with --(\w+) (\w+)", said):
        yield {**settings, name: value} | ({"rotate_rank": 1} if name != "let_shift" else {})
    for names in re.findall(r"(?:; |use |, or )--format ([\w-]+(?: or [\w-]+)*)", said):
        yield from ({**settings, "format": name} for name in names.split(" or "))


def require_as_measured(run, form, saved, stored):
    """Decoded by config.json alone it is what was frozen: every bit, if in the dtype asked for.

    Where Hadamard matrices are multiplied back it is as near as sums in another order.
    """
    model, plan = run.workbench.model, run.workbench.plan
    config = json.loads((saved / "config.json").read_text())
    dtype = checkpoint_dtype(model, plan, form)
    exact = dtype == (plan.scale_dtype or model_dtype(model))
    for index in range(len(model.blocks)):
        name = model.block_name(index)
        inside = {n.removeprefix(f"{name}."): t for n, t in stored.items() if n.startswith(name)}
        decoded = form.decode(inside, name, config.get("quantization_config") or {})
        for factor in [key for key in decoded if key.endswith(INPUT_FACTOR_SUFFIX)]:
            weight = factor.removesuffix(INPUT_FACTOR_SUFFIX) + ".weight"
            decoded[weight] = decoded[weight] * decoded.pop(factor)
        frozen = learned_view(run.workbench, run.folder, index).freeze()
        expected = frozen.dense() | frozen.input_clips
        assert decoded.keys() == expected.keys()
        for key, tensor in expected.items():
            matrix = frozen.matrices.get(key.removesuffix(".weight"))
            mixed = matrix is not None and matrix.scheme.hadamard
            close = 0 if exact else torch.finfo(dtype).eps
            close = max(close, 8 * torch.finfo(dtype).eps) if mixed else close
            pair = decoded[key].to(dtype), tensor.to(dtype)
            torch.testing.assert_close(*pair, rtol=close, atol=close, msg=f"{name}.{key}")


def require_as_told(run, saved, foretold):
    """Its files are what the pre-flight foretold, and what they say of themselves."""
    verified, told = verify(saved), inspect_folder(saved)
    assert verified.problems == []
    assert verified.bits_per_weight == pytest.approx(foretold.bits_per_weight)
    assert f"{verified.bits_per_weight:.3f}" in told and "verified: hashes of" in told
    size = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
    assert foretold.total == pytest.approx(size, rel=0.02)
    card = (saved / "README.md").read_text()
    assert all(run.config.schemes.describe() in text for text in (told, card))
    assert Config.from_yaml(saved / SETTINGS) == run.config
    ids = AutoTokenizer.from_pretrained(saved)("any text").input_ids
    assert ids == run.workbench.model.tokenizer("any text").input_ids


def holds(form, settings):
    """Whether a format takes settings, as far as these alone tell."""
    plan = Plan.of(Config(**{**settings, "format": None, "save_dir": None}).resolved().quantizing)
    return form.schemes_refusal(plan.schemes) is None


@pytest.fixture
def first_held(settings_of):
    """first_held(form, **settings) -> settings with the first scheme of rows that it holds"""

    def make(form, **settings):
        schemes = [s for s in dict.fromkeys(s for _, s, _ in CASES.values()) if "g" not in s]
        every = (settings_of(form, scheme, **settings) for scheme in schemes)
        return next(each for each in every if holds(form, each))

    return make


@FORMATS
@pytest.mark.parametrize("case", CASES)
def test_a_run_is_refused_before_learning_or_written_as_it_was_measured(
    form, case, settings_of, tiny, written
):
    family, scheme, others = CASES[case]
    settings = settings_of(form, scheme, **others)
    run = written(form, tiny(family), settings)
    assert (run is not None) == holds(form, settings), "asked before the model is read"


@FORMATS
@pytest.mark.parametrize("what", HELD)
def test_it_holds_what_it_says_and_refuses_the_rest(form, what, first_held, tiny, written):
    run = written(form, tiny("llama"), first_held(form, **HELD[what]))
    assert (run is not None) == (what in form.holds)


@FORMATS
def test_a_kind_of_grid_is_held_or_refused(form, settings_of, tiny, written, monkeypatch):
    kinds = {**grid.grid_kinds(), "doubled": Doubled}
    monkeypatch.setattr(grid, "grid_kinds", lambda: kinds)
    run = written(form, tiny("llama"), settings_of(form, "W4A16g32-doubled"))
    assert (run is not None) == (not form.grids or "doubled" in form.grids)


@FORMATS
def test_odd_shapes_are_refused_or_written(form, first_held, tiny, written):
    """Rows and columns that fill no whole number of words."""
    odd = {"hidden_size": 132, "intermediate_size": 196, "head_dim": 34}
    written(form, tiny("llama", **odd), first_held(form, **HALF))


@pytest.fixture
def learned(first_held, tiny, tiny_tokenizer):
    """A run of what a format holds, not yet written."""

    def make(form):
        settings = {**first_held(form), "save_dir": None}
        return quantize(tiny("llama-biases"), tokenizer=tiny_tokenizer, **settings)

    return make


def save(run, form, place, change=lambda name, tensor: tensor):
    def tensors(frozen, dtype):
        return {name: change(name, t) for name, t in form.tensors(frozen, dtype).items()}

    changed = dataclasses.replace(form, tensors=tensors)
    save_checkpoint(run.workbench, run.config.origin, run.folder, place, changed)


def flipped(tensor):
    """The first value is another, by one bit or by much more than rounding."""
    values = tensor.clone()
    first = (0,) * tensor.dim()
    values[first] = values[first] * 1.25 + 0.25 if tensor.is_floating_point() else values[first] ^ 1
    return values


@FORMATS
def test_a_value_that_differs_is_found_and_nothing_is_put_in_place(form, learned, tmp_path):
    run = learned(form)
    last = learned_view(run.workbench, run.folder, 1).freeze()
    names = form.tensors(last, checkpoint_dtype(run.workbench.model, run.workbench.plan, form))
    kinds = {name.rpartition(".")[2]: name for name in sorted(names)}
    for chosen in {*kinds.values(), min(names)}:
        with pytest.raises(LRQuantError, match=r"read back, .* nothing is put in place") as error:
            save(run, form, tmp_path / "wrong", lambda n, t, c=chosen: flipped(t) if n == c else t)
        assert "\n" not in str(error.value) and not (tmp_path / "wrong").exists(), chosen


@FORMATS
def test_two_exports_have_the_same_bytes_and_damage_is_found(form, learned, tmp_path):
    run = learned(form)
    for name in ("one", "two"):
        save(run, form, tmp_path / name)
    files = {path.name: path for path in (tmp_path / "one").iterdir()}
    assert files.keys() == {path.name for path in (tmp_path / "two").iterdir()}
    for name, path in files.items():
        assert path.read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    for name in json.loads(files[MANIFEST].read_text())["files"]:
        whole = files[name].read_bytes()
        files[name].write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        if name.endswith(".safetensors"):
            said = f"{name}: changed since it was written (SHA-256 differs)"
            assert verify(tmp_path / "one").problems == [said]
        with pytest.raises(LRQuantError) as error:
            inspect_folder(tmp_path / "one")
        assert "\n" not in str(error.value), name
        files[name].write_bytes(whole)
    assert verify(tmp_path / "one").problems == []


@FORMATS
@pytest.mark.parametrize("target", TARGETS)
def test_a_target_loads_it_or_is_refused_with_a_mend(form, target, first_held):
    """A mend is another scheme for it, or that it is not for that target at all."""

    def chosen(settings):
        config = Config(**settings).resolved()
        return choose_format(Plan.of(config.quantizing), config.format, config.target)

    settings = {**first_held(form), "target": target}
    try:
        assert chosen(settings) is form
    except LRQuantError as error:
        said = str(error)
        assert "\n" not in said and said.startswith(f"--format {form.name} with --target {target}")
        if "leave --format or --target out" not in said:
            symmetric = "--activation_symmetric" in said
            name = re.search(r"loads is --scheme ([\w-]+)", said)[1]
            assert chosen({**settings, "scheme": name, "activation_symmetric": symmetric}) is form
