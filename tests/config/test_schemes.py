"""Schemes by pattern: which matrices a pattern names, and which scheme each matrix has."""

from __future__ import annotations

import pytest
import torch

from lrquant import quantize
from lrquant.blocks.plan import Plan
from lrquant.config.config import Config
from lrquant.config.scheme import FLOATING_POINT, Scheme
from lrquant.config.schemes import Schemes, matches, parse_patterns
from lrquant.errors import LRQuantError

W2, W3, W4, W8 = (Scheme(bits) for bits in (2, 3, 4, 8))
DOWN = "model.layers.0.mlp.down_proj"
NAMES = [
    f"model.layers.{block}.{name}"
    for block in range(12)
    for name in ("self_attn.q_proj", "self_attn.qkv.v", "mlp.up_proj", "mlp.down_proj")
]


def named_by(pattern: str) -> list[str]:
    return [name for name in NAMES if matches(pattern, name)]


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("mlp.down_proj", 12),
        ("down_proj", 12),
        ("mlp", 24),
        ("self_attn", 24),
        ("qkv", 12),
        ("qkv.v", 12),
        ("v", 12),
        ("layers.0", 4),
        ("layers.0.*", 4),
        ("layers.1", 4),
        ("layers.1*", 12),
        ("layers.?", 40),
        ("layers.1[01]", 8),
        ("layers.0.mlp.down_proj", 1),
        ("model.layers.0.mlp.down_proj", 1),
        ("model", 48),
        ("layers", 48),
        ("*", 48),
        ("layers.*.mlp", 24),
    ],
)
def test_a_pattern_names_the_end_of_a_name_or_a_part_of_it(pattern, count):
    assert len(named_by(pattern)) == count


@pytest.mark.parametrize(
    "pattern",
    ["own_proj", "mlp.down", "layer", "MLP", "layers.12", "odel.layers.0", "", "."],
)
def test_a_piece_between_dots_is_named_whole(pattern):
    """Negative controls."""
    assert named_by(pattern) == []


def test_without_patterns_there_is_one_scheme():
    schemes = Schemes(W4)
    assert {schemes.of(name) for name in NAMES} == {W4}
    assert not schemes.mixed and schemes.every == (W4,) and schemes.name == "W4A16"


def test_the_last_that_fits_counts():
    patterns = (("layers.0", W8), ("mlp.down_proj", W3), ("layers.0.mlp", W2))
    assert Schemes(W4, patterns).of(DOWN) == W2
    assert Schemes(W4, patterns[:2]).of(DOWN) == W3
    assert Schemes(W4, patterns[1::-1]).of(DOWN) == W8
    whole = Schemes(W4, patterns)
    assert whole.of("model.layers.0.self_attn.q_proj") == W8
    assert whole.of("model.layers.1.mlp.down_proj") == W3
    assert whole.of("model.layers.1.mlp.up_proj") == W4
    assert whole.mixed and whole.every == (W4, W8, W3, W2)


def test_the_order_of_patterns_is_that_of_the_settings():
    config = Config(scheme="W4A16", scheme_for=("mlp=W3A16", "layers.0=W8A16g16"))
    assert config.schemes.of(DOWN) == Scheme(8, 16, 16)
    turned = Config(scheme="W4A16", scheme_for=("layers.0=W8A16g16", "mlp=W3A16"))
    assert turned.schemes.of(DOWN) == W3


def test_16_leaves_matrices_alone():
    schemes = Schemes(Scheme(4, 4), (("mlp", FLOATING_POINT),))
    assert schemes.of(DOWN).floating_point
    assert not schemes.floating_point and not schemes.weight_only and schemes.quantizes_weights
    nothing = Schemes(FLOATING_POINT, (("mlp", Scheme(16, 16)),))
    assert nothing.floating_point and nothing.weight_only and not nothing.quantizes_weights
    some = Schemes(FLOATING_POINT, (("mlp", W4),))
    assert some.quantizes_weights and some.weight_only and not some.floating_point


def test_a_matrix_that_is_left_alone_keeps_its_weight(make_model, make_bench):
    config = Config(scheme="W2A16", scheme_for=("mlp.down_proj=W16A16",)).resolved()
    module = make_model("llama")
    bench = make_bench(module, plan=Plan.of(config.quantizing))
    frozen = bench.nearest.view(0, bench.stored(0)).freeze()
    tensors, block = frozen.tensors(torch.float32), module.model.layers[0]
    assert "mlp.down_proj" not in frozen.matrices and len(frozen.matrices) == 6
    assert torch.equal(tensors["mlp.down_proj.weight"], block.mlp.down_proj.weight)
    assert not torch.equal(tensors["mlp.up_proj.weight"], block.mlp.up_proj.weight)


def test_a_pattern_that_names_nothing_is_refused():
    schemes = Schemes(W4, (("mlp.down_proj", W3), ("mlp.dwon_proj", W8)))
    with pytest.raises(LRQuantError) as caught:
        schemes.require_used(NAMES)
    message = str(caught.value)
    assert message.startswith("--scheme-for mlp.dwon_proj: names no matrix of this model")
    assert NAMES[0] in message and NAMES[-1] in message
    Schemes(W4, (("mlp.down_proj", W3),)).require_used(NAMES)


def test_a_pattern_that_others_hide_is_not_unused():
    Schemes(W4, (("layers.0.mlp", W3), ("mlp", W8))).require_used(NAMES)


def test_a_run_with_an_unused_pattern_is_refused_before_learning(make_model, token_ids, tmp_path):
    for pattern in ("mlp.dwon_proj", "layers.2"):
        with pytest.raises(LRQuantError, match=rf"--scheme-for {pattern}: names no matrix"):
            quantize(
                make_model("llama"),
                "W4A16",
                calibration=token_ids(1, 12),
                scheme_for=(f"{pattern}=W8A16",),
                output_dir=str(tmp_path / "run"),
            )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["mlp", "=W4A16", "mlp=", "mlp W4A16", ""])
def test_what_is_no_pattern_and_scheme_is_refused_with_an_example(text):
    with pytest.raises(LRQuantError, match=r"expected (PATTERN=SCHEME|W<bits>)"):
        parse_patterns((text,), False)


def test_a_scheme_that_is_none_is_refused_when_it_is_given():
    with pytest.raises(LRQuantError, match="weight bits 9"):
        Config(scheme="W4A16", scheme_for=("mlp=W9A16",))


def test_activations_are_symmetric_as_those_of_the_run():
    for symmetric in (False, True):
        (pair,) = parse_patterns((" mlp = W8A8-sym ",), symmetric)
        assert pair == ("mlp", Scheme(8, 8, None, True, symmetric))


def test_a_tower_has_its_own_default_and_the_same_patterns():
    patterns = (("vision.layers.0", W8),)
    schemes = Schemes(W4, patterns, tower=W3)
    assert schemes.of_tower == Schemes(W3, patterns)
    assert schemes.every == (W4, W8, W3)
    assert schemes.of_tower.of("vision.layers.1.fc1") == W3
    assert schemes.of_tower.of("vision.layers.0.fc1") == W8
    assert Schemes(W4, patterns).of_tower == Schemes(FLOATING_POINT), "no scheme, no patterns"


def test_they_are_told_in_their_order():
    schemes = Schemes(W4, (("layers.0", W8), ("mlp", W3)))
    assert schemes.name == "W4A16, layers.0=W8A16, mlp=W3A16"
    assert schemes.describe().startswith(W4.describe())
    assert schemes.describe().endswith("; but layers.0: W8A16, mlp: W3A16")


@pytest.mark.parametrize(
    "patterns",
    [
        ("layers.0=W8A16", "mlp=W3A16"),
        ("mlp=W3A16", "layers.0=W8A16"),
        ("mlp=W3A16", "layers.0=W8A16", "mlp=W2A16"),
    ],
)
def test_a_file_of_settings_keeps_which_scheme_each_matrix_has(patterns, tmp_path):
    """Also where a pattern is given twice, which a mapping does not hold."""
    config = Config(scheme="W4A16", scheme_for=patterns)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    read = Config.from_yaml(tmp_path / "config.yaml")
    assert [read.schemes.of(n) for n in NAMES] == [config.schemes.of(n) for n in NAMES]


def test_a_file_may_hold_them_as_a_mapping_or_a_list(tmp_path):
    as_mapping = "scheme: W4A16\nscheme_for:\n  mlp: W3A16\n  layers.0: W8A16\n"
    as_list = "scheme: W4A16\nscheme-for: [mlp=W3A16, layers.0=W8A16]\n"
    for text in (as_mapping, as_list):
        path = tmp_path / "settings.yaml"
        path.write_text(text)
        assert Config.from_yaml(path).scheme_for == ("mlp=W3A16", "layers.0=W8A16")
