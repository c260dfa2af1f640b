"""Settings: published defaults, YAML both ways, conversion, refusals, and what is resolved."""

from __future__ import annotations

import dataclasses
import os
import typing

import pytest
import yaml

from lrquant.config.config import Config, overridden, preset, typed_settings, with_preset
from lrquant.config.core import PRESETS
from lrquant.config.scheme import Scheme
from lrquant.config.settings import convert, require_one_scheme
from lrquant.errors import LRQuantError

PUBLISHED = {
    **{"wbits": 4, "abits": 4, "group_size": None, "symmetric": False},
    **{"lwc_lr": 1e-2, "let_lr": 5e-3, "wd": 0, "epochs": 10, "batch_size": 1},
    **{"calib_dataset": "wikitext2", "nsamples": 128, "seed": 2, "seqlen": 2048},
    **{"eval_ppl": False, "tasks": "", "num_fewshot": 0, "limit": -1, "net": None},
    **{"act_scales": None, "act_shifts": None, "resume": None, "save_dir": None},
}

OTHER = {
    "bos": "always",  # a legal value that is not the default, by type or by name
    **{int: 3, float: 0.25, str: "text", bool: True, "let_shift": "never", "loss": "nlc"},
    **{"vision_scheme": "W8A8", "vqa": ("q.jsonl",), "scheme_for": ("0=W8A16", "1=W3A16")},
    **{
        "precision": "float32",
        "offload": "disk",
        "compile": "off",
        "let_sites": ("norm",),
        "ppl": ("ptb", "c4"),
    },
    **{"preset": "paper", "rotation_sharing": "linear", "ema_init": "one", "keep_best": False},
    **{"agreement": ("c4",), "target": "vllm", "save_dtype": "float16", "task_batch_size": "4"},
    **{"report": False, "examples": False, "deterministic": False, "bos": "never"},
}


def kind_of(name):
    hint = typing.get_type_hints(Config)[name]
    return next(part for part in (typing.get_args(hint) or (hint,)) if part is not type(None))


def a_config_with_nothing_at_its_default():
    names = [entry.name for entry in dataclasses.fields(Config)]
    config = Config(**{name: OTHER.get(name, OTHER.get(kind_of(name))) for name in names})
    assert all(getattr(config, name) != getattr(Config(), name) for name in names)
    return config


def test_defaults_are_those_of_the_published_tool():
    config = Config()
    assert {name: getattr(config, name) for name in PUBLISHED} == PUBLISHED


def test_every_setting_is_explained():
    assert all(len(entry.metadata["help"]) > 8 for entry in dataclasses.fields(Config))


@pytest.mark.parametrize(
    "config", [Config(), a_config_with_nothing_at_its_default()], ids=["defaults", "all changed"]
)
def test_yaml_round_trip(config, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml())
    assert Config.from_yaml(path) == dataclasses.replace(config, overwrite=False)
    assert list(yaml.safe_load(config.to_yaml())) == [e.name for e in dataclasses.fields(Config)]


@pytest.mark.parametrize(
    "config",
    [
        Config(model="m"),
        Config(model="m", scheme="W3A16g64", lwc=True),
        Config(model="m", scheme="W4A4-sym-qkv8", activation_symmetric=True),
        Config(model="m", wbits=4, abits=4, let=True),
        Config(model="m", epochs=0),
    ],
)
def test_a_resolved_configuration_stays_as_it_is(config, tmp_path):
    resolved = config.resolved()
    assert resolved.resolved() == resolved
    (tmp_path / "run.yaml").write_text(resolved.to_yaml())
    assert Config.from_yaml(tmp_path / "run.yaml").resolved() == resolved
    require_one_scheme(dataclasses.asdict(resolved))


def test_a_yaml_file_of_a_person(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("scheme: W4A4\nlwc_lr: 1e-3\nlet-sites: [norm]\nppl: wikitext2, ptb\nlet:\n")
    config = Config.from_yaml(path)
    assert (config.scheme, config.lwc_lr, config.let_sites) == ("W4A4", 1e-3, ("norm",))
    assert config.ppl == ("wikitext2", "ptb") and config.let is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("epoch: 3", "unknown setting 'epoch'"),
        ("epochs: many", "epochs: expected a whole number, got 'many'"),
        ("epochs: 1.5", "epochs: expected a whole number, got 1.5"),
        ("epochs: .inf", "epochs: expected a whole number, got inf"),
        ("epochs: true", "epochs: expected a whole number, got True"),
        ("epochs:", "epochs: expected a whole number, got None"),
        ("lwc_lr: [1]", "lwc_lr: expected a number"),
        ("lwc: 1", "lwc: expected true or false, got 1"),
        ("lwc: 'no'", "lwc: expected true or false, got 'no'"),
        ("model: [a, b]", "model: expected text"),
        ("tasks:", "tasks: expected text, got None"),
        ("ppl: 5", "ppl: expected a list, got 5"),
        ("ppl:", "ppl: expected a list, got None"),
        ("- epochs", "expected `setting: value` lines"),
        ("", "expected `setting: value` lines"),
        ("epochs: [", "cannot be read"),
        ("scheme: ''", "scheme '': empty; give a value, or leave it out"),
        ("output_dir: ' '", "output_dir ' ': empty"),
        ("ppl: ','", "ppl ',': names nothing"),
        ("let_sites: ['', ' ']", "names nothing"),
        ("ppl: [[a]]", "ppl: expected text, got ['a']"),
        ("seed: 1\nepochs: 2\nseed: 3", "line 1: seed twice"),
        ("lwc_lr: 1\nlwc-lr: 2", "given twice, with dashes and with underscores"),
        ("a: &a [x, x]\nppl: *a", "line 2: an alias (*name): write it out"),
        ("a: &a {b: 1}\n<<: *a", "an alias"),
        ("? [a]\n: 1", "unhashable"),
        ("1: 2", "unknown setting 1"),
        ("epochs: 2020-01-01", "epochs: expected a whole number, got datetime.date"),
        ("epochs: 2020-13-45", "cannot be read (month must be in 1..12)"),
        ("epochs: " + "9" * 5000, "cannot be read (Exceeds the limit"),
        ("epochs: '" + "9" * 5000 + "'", "9…"),
        ("[" * 5000, "nested too deeply"),
        ("output_dir: !!python/object:os.system {}", "could not determine a constructor"),
        ('output_dir: "a\\nb"', r"holds '\n', which is no character of a text in UTF-8"),
        ('output_dir: "a\\0b"', r"holds '\x00'"),
        ('output_dir: "\\uD800"', r"holds '\ud800'"),
        ("ppl: " + "9" * 4000, "expected a list, got a whole number of more than 30 digits"),
        ("model: !!binary aGVsbG8=", "model: expected text, got b'hello'"),
    ],
    ids=lambda value: value[:30],
)
def test_a_wrong_yaml_file_is_refused_by_name_and_value(content, said, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(LRQuantError) as error:
        Config.from_yaml(path)
    assert said in str(error.value) and str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_yaml_that_is_not_there_or_not_text(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    os.mkfifo(tmp_path / "fifo.yaml")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    for name in ("absent.yaml", "binary.yaml", "fifo.yaml", "folder.yaml", "loop.yaml"):
        with pytest.raises(LRQuantError, match=name):
            Config.from_yaml(tmp_path / name)


def test_text_of_a_command_line_is_converted():
    hints = typing.get_type_hints(Config)
    assert convert(hints["epochs"], "20", "") == 20
    assert (
        convert(hints["group_size"], "64", "") == 64
        and convert(hints["group_size"], None, "") is None
    )
    assert convert(hints["lwc_lr"], "1e-2", "") == 1e-2
    assert convert(hints["ppl"], "wikitext2, c4,", "") == ("wikitext2", "c4")
    assert convert(hints["ppl"], r"a\,b.txt,c4", "") == ("a,b.txt", "c4")
    assert typed_settings({"act-scales": "x.pt"}, "here") == {"act_scales": "x.pt"}


@pytest.mark.parametrize(
    "settings",
    [
        *({"epochs": -1}, {"nsamples": 0}, {"batch_size": 0}, {"seqlen": 1}),
        *({"limit": 0}, {"limit": -2}),
        *({"lwc_lr": -0.1}, {"let_lr": float("nan")}, {"wd": float("inf")}),
        *({"let_shift": "yes"}, {"precision": "fp8"}, {"offload": "cloud"}, {"compile": "maybe"}),
        {"let_sites": ("norm", "attention")},
        *({"rotate_rank": 0}, {"rotation_lr": -1.0}, {"rotation_sharing": "row"}),
        *({"ema_init": "last"}, {"lwc_init": float("inf")}, {"preset": "worst"}),
        *({"tta_blocks": 0}, {"tta_epochs": 0}, {"tta_let_lr": float("nan")}),
        *({"epochs": 10**20}, {"nsamples": 10**20}, {"seqlen": 10**18}, {"rotate_rank": 10**20}),
        *({"batch_size": 2**40}, {"tta_blocks": 10**9}, {"tta_epochs": 10**9}, {"limit": 2**63}),
        *({"seed": -1}, {"seed": 2**63}, {"num_fewshot": -1}, {"num_fewshot": 10**9}),
        *({"lwc_lr": 1e31}, {"wd": 1e31}, {"lwc_init": -1e3}, {"lwc_init": float("nan")}),
        *({"image_token_weight": 1e30}, {"image_token_weight": float("nan")}, {"max_drop": 2.0}),
        *({"calib_image_share": float("nan")}, {"max_drop": float("nan")}),
        *({"task_batch_size": "9" * 30}, {"task_batch_size": "0"}, {"task_batch_size": "-1"}),
    ],
    ids=str,
)
def test_a_value_out_of_range_is_named(settings):
    ((name, value),) = settings.items()
    with pytest.raises(LRQuantError) as error:
        Config(**settings)
    wrong = value[1] if isinstance(value, tuple) else value
    assert (
        name in str(error.value) and str(wrong) in str(error.value) and "use " in str(error.value)
    )


@pytest.mark.parametrize(
    "settings",
    [
        *({"scheme": ""}, {"output_dir": ""}, {"save_dir": " "}, {"device": ""}, {"net": ""}),
        *({"compare": ""}, {"resume": ""}, {"tasks": ","}, {"tasks": " , ,"}),
        *({"epochs": "3"}, {"epochs": None}, {"epochs": True}, {"epochs": 1.5}, {"ppl": "c4"}),
        *({"ppl": ["c4"]}, {"model": 3}, {"model": b"x"}, {"lwc": "yes"}, {"lwc_lr": "1"}),
        {"scheme": 4},
    ],
    ids=str,
)
def test_a_value_that_is_empty_or_of_another_kind_is_named(settings):
    ((name, value),) = settings.items()
    with pytest.raises(LRQuantError) as error:
        Config(**settings)
    assert str(error.value).startswith(name) and repr(value) in str(error.value)


@pytest.mark.parametrize("size", [0, -1])
def test_groups_of_no_size(size):
    with pytest.raises(LRQuantError, match=f"group size {size}: use a positive number"):
        Config(group_size=size).resolved()


@pytest.mark.parametrize("name", ["wbits", "abits", "qkv_bits"])
@pytest.mark.parametrize("bits", [0, 1, 9, 15, 17, 32])
def test_bits_out_of_range(name, bits):
    with pytest.raises(LRQuantError, match=rf"bits {bits}: use 2 to 8, or 16"):
        Config(**{name: bits}).resolved()


@pytest.mark.parametrize("bits", [2, 3, 8, 16])
def test_bits_in_range(bits):
    assert Config(wbits=bits, abits=bits).resolved().scheme == f"W{bits}A{bits}"


def test_scheme_and_bits_say_the_same():
    short = Config(scheme="W3A8g64-sym-qkv16").resolved()
    long = Config(wbits=3, abits=8, group_size=64, symmetric=True, qkv_bits=16).resolved()
    assert short == long
    assert short.quantization == Scheme(3, 8, 64, symmetric=True, qkv_bits=16)
    assert Config(scheme="W4A16", group_size=32).resolved().scheme == "W4A16g32"


@pytest.mark.parametrize(
    "settings",
    [
        *({"scheme": "W4A4", "wbits": 3}, {"scheme": "W3A16", "abits": 4}),
        *({"scheme": "W3A16", "wbits": 4}, {"scheme": "W4A16g64", "group_size": 128}),
        *({"scheme": "W4A4-sym", "symmetric": False}, {"scheme": "W4A4-qkv8", "qkv_bits": 4}),
    ],
    ids=str,
)
def test_bits_that_contradict_the_scheme_beside_them(settings):
    with pytest.raises(LRQuantError, match=f"scheme {settings['scheme']} and .* disagree"):
        require_one_scheme(settings)


def test_bits_that_agree_with_the_scheme_beside_them():
    require_one_scheme({"scheme": "W4A16g64", "wbits": 4, "abits": 16, "group_size": 64})
    require_one_scheme({"scheme": "W4A16", "group_size": 64, "symmetric": True, "qkv_bits": None})
    require_one_scheme({"scheme": None, "wbits": 3})


@pytest.mark.parametrize(
    ("file", "typed", "scheme"),
    [
        ({"scheme": "W4A4"}, {"wbits": 3}, "W3A4"),
        ({"scheme": "W4A16g64-sym"}, {"abits": 8}, "W4A8g64-sym"),
        ({"scheme": "W4A4", "wbits": 4, "abits": 4}, {"scheme": "W3A16g32"}, "W3A16g32"),
        ({"wbits": 2, "abits": 16, "group_size": 64}, {"scheme": "W4A4"}, "W4A4"),
        ({"wbits": 2, "abits": 16}, {"abits": 8}, "W2A8"),
        ({"scheme": "W4A4"}, {"epochs": 3}, "W4A4"),
    ],
)
def test_what_is_typed_replaces_what_a_file_says(file, typed, scheme):
    settings = overridden(file, typed)
    require_one_scheme(settings)
    assert Config(**settings).resolved().scheme == scheme


def test_methods_that_follow_from_the_scheme():
    def methods(**settings):
        config = Config(**settings).resolved()
        return config.lwc, config.let

    assert methods(scheme="W4A4") == (True, True)
    assert methods(scheme="W4A16") == (True, False)
    assert methods(scheme="W16A8") == (False, True)
    assert methods(scheme="W16A16") == (False, False)
    assert methods(scheme="W4A4", lwc=True) == (True, False)
    assert methods(scheme="W4A4", let=True) == (False, True)
    assert methods(scheme="W4A4", epochs=0) == (False, False)


def test_methods_without_effect_are_refused():
    with pytest.raises(LRQuantError, match="--let with W16A16"):
        Config(scheme="W16A16", let=True).resolved()
    with pytest.raises(LRQuantError, match="--lwc with --wbits 16"):
        Config(wbits=16, lwc=True).resolved()
    assert Config(scheme="W4A16", let=True).resolved().let


PARTS = ("rotation", "two_branch", "dynamic_weights")


def parts(**settings):
    config = Config(**settings).resolved()
    return tuple(getattr(config, name) for name in PARTS)


def test_the_parts_of_lrquant_plus():
    assert parts(scheme="W4A4") == (False, False, False)
    assert parts(scheme="W4A4", lr_plus=True) == (True, True, True)
    for index, name in enumerate(PARTS):
        alone = tuple(index == i for i in range(3))
        assert parts(scheme="W4A16", lwc=True, **{name: True}) == alone
        assert parts(scheme="W4A16", lr_plus=True, **{name: False}) == tuple(
            not part for part in alone
        )
    assert parts(scheme="W4A4", lr_plus=True, epochs=0) == (False, False, False)
    nothing = {"lwc": False, "let": False, "rotation": False}
    assert parts(scheme="W4A4", lr_plus=True, **nothing) == (False, False, False)
    for name in ("two_branch", "dynamic_weights"):
        with pytest.raises(LRQuantError, match=f"--{name}: nothing is learned"):
            Config(scheme="W4A4", lwc=False, let=False, **{name: True}).resolved()
    assert parts(scheme="W16A4", lr_plus=True) == (False, True, True), "no weight is quantised"


def test_the_form_of_the_rotation_vectors():
    assert Config(lr_plus=True).resolved().rotation_sharing == "site"
    assert Config(lr_plus=True, rotate_rank=2).resolved().rotation_sharing == "weight"
    assert Config(lr_plus=True, rotation_sharing="linear").resolved().rotation_sharing == "linear"
    for sharing in ("site", "linear", "none"):
        with pytest.raises(
            LRQuantError, match=f"--rotate_rank 3 with --rotation_sharing {sharing}"
        ):
            Config(rotation=True, rotate_rank=3, rotation_sharing=sharing).resolved()
    with pytest.raises(LRQuantError, match="--rotation with --wbits 16"):
        Config(scheme="W16A4", rotation=True).resolved()


def test_the_paper_s_preset_gives_way_to_what_is_given():
    settings = with_preset({"preset": "paper", "epochs": 3, "model": "m", "lr_plus": True})
    config = Config(**settings).resolved()
    assert (config.epochs, config.ema_init, config.rotation_sharing) == (3, "one", "weight")
    assert config.let_shift == "always" and config.lwc_init == 4.0 and not config.keep_best
    assert with_preset({"epochs": 3}) == {"epochs": 3}
    assert Config(**with_preset(dataclasses.asdict(config))) == config, "a file of it is the same"


@pytest.mark.parametrize(
    ("scheme", "rounding", "tune"),
    [("W4A4", True, True), ("W2A16g64", True, True), ("W16A8", False, True), ("W16A16", 0, 0)],
)
@pytest.mark.parametrize("name", ["balanced", "best"])
def test_a_preset_learns_what_the_scheme_has_a_use_for(scheme, rounding, tune, name):
    config = Config(**with_preset({"preset": name, "scheme": scheme})).resolved()
    assert (config.rounding, config.tune) == (bool(rounding), bool(tune))
    assert config.two_branch == (scheme != "W16A16")
    assert (config.nsamples, config.tune_nsamples) == (
        (256, 1024) if name == "best" else (128, 256)
    )
    assert (config.tune_epochs, config.tune_rounding) == (1, bool(tune))
    given = with_preset({"preset": name, "scheme": scheme, "rounding": False, "tune": False})
    assert not given["rounding"] and not given["tune"]
    with pytest.raises(LRQuantError, match="--rounding with --wbits 16"):
        Config(**with_preset({"scheme": "W16A8", "rounding": True})).resolved()


@pytest.mark.parametrize(
    ("scheme", "clipped"),
    [
        *(("W4A4-hadamard", True), ("W4A4-r3-hadamard", True), ("W6A6-r3-hadamard", False)),
        *(("W4A4", False), ("W4A4-qkv16-hadamard", False), ("W4A16-hadamard", False)),
    ],
)
@pytest.mark.parametrize("name", ["fast", "balanced", "best"])
def test_a_preset_clips_activations_where_it_pays(scheme, clipped, name):
    """Few bits, behind matrices, of a scheme that no format but the native one holds."""
    assert Config(**with_preset({"preset": name, "scheme": scheme})).resolved().lac == clipped
    assert not Config(**with_preset({"scheme": scheme})).resolved().lac
    some = {"scheme_for": ("mlp.down_proj=W4A4-hadamard",), "preset": name, "scheme": "W4A4"}
    assert not Config(**with_preset(some)).resolved().lac
    asked = {"preset": name, "scheme": scheme, "lac": False}
    assert not Config(**with_preset(asked)).resolved().lac


def test_a_switch_over_a_file_of_resolved_settings_is_a_switch():
    plain = dataclasses.asdict(Config(model="m").resolved())
    plus = dataclasses.asdict(Config(model="m", lr_plus=True).resolved())

    def resolved(file, **typed):
        return Config(**with_preset(overridden(file, typed))).resolved()

    assert resolved(plain, lr_plus=True) == Config(model="m", lr_plus=True).resolved()
    assert resolved(plus, lr_plus=False) == Config(model="m").resolved()
    assert resolved(plus, rotation=False).two_branch
    paper = resolved(plus, preset="paper")
    assert (paper.epochs, paper.lwc_init, paper.keep_best) == (20, 4.0, False)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_name_settings(name):
    assert typed_settings(preset(name), name) == preset(name)
    Config(**preset(name), preset=name).resolved()


def test_net_is_the_last_part_of_the_model():
    assert Config(model="/models/llama-7b/").net_name == "llama-7b"
    assert Config(model="org/opt-125m").resolved().net == "opt-125m"
    assert Config(model="org/opt-125m", net="opt").net_name == "opt"
