"""Inputs times Hadamard matrices, and weights times the same: the function stays what it is."""

from __future__ import annotations

import pytest
import torch
from scipy.linalg import hadamard as matrix_of

from lrquant import quantize
from lrquant.blocks.inputs import BlockInputs
from lrquant.blocks.plan import Plan, plan_block
from lrquant.blocks.workbench import advance_full_precision
from lrquant.config.scheme import FLOATING_POINT, Scheme
from lrquant.config.schemes import Schemes
from lrquant.errors import LRQuantError
from lrquant.numerics.hadamard import LEAST, hadamard, hadamard_size

ROTATED = Scheme(4, 16, hadamard=True)


@pytest.mark.parametrize(("channels", "size"), [(16, 16), (48, 16), (576, 64), (11008, 256)])
def test_blocks_of_channels_are_multiplied_by_the_matrix_of_another_library(channels, size):
    assert hadamard_size(channels) == size
    values = torch.randn(3, 2, channels, generator=torch.Generator().manual_seed(0))
    matrix = torch.tensor(matrix_of(size)).double() / size**0.5
    expected = (values.double().unflatten(-1, (-1, size)) @ matrix).flatten(-2)
    torch.testing.assert_close(hadamard(values).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hadamard(hadamard(values)), values, rtol=1e-5, atol=1e-5)


def rotating(model) -> Schemes:
    """Every matrix times a Hadamard one, but for those whose inputs nothing tells of."""
    names = []
    for index, block in enumerate(model.blocks):
        stored = block.state_dict()
        for matrix in model.matrices(index):
            columns = matrix.of(stored[matrix.parameter]).shape[1]
            if matrix.reads is not None and hadamard_size(columns) >= LEAST:
                names.append(f"{model.block_name(index)}.{matrix.name}")
    return Schemes(FLOATING_POINT, tuple((name, ROTATED) for name in names))


@torch.no_grad()
def states_after(bench, ids):
    """Hidden states after all blocks, none of which is quantised."""
    entry = BlockInputs(bench.model, ids, 1, bench.device)
    (stream,) = bench.streams(entry, 1)
    entry.embed(stream)
    for index in range(len(bench.model.blocks)):
        stored = bench.stored(index)
        advance_full_precision(bench, index, stored, entry, stream, stream)
    return torch.cat([stream.read(batch) for batch in entry.batches])


def test_no_block_computes_anything_else(first_variant, make_model, make_bench, token_ids):
    module, ids = make_model(first_variant), token_ids(2, 12)
    plain = make_bench(module)
    plan = Plan(rotating(plain.model))
    assert plan.schemes.patterns
    rotated = make_bench(module, plan=plan)
    weights = zip(plain.stored(0).values(), rotated.stored(0).values(), strict=True)
    assert any(not torch.equal(*pair) for pair in weights)
    states, expected = states_after(rotated, ids), states_after(plain, ids)
    largest = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-5 * largest)


def test_scales_that_would_have_to_pass_a_matrix_are_not_there(make_model, make_bench):
    model = make_bench(make_model("llama")).model
    schemes = Schemes(Scheme(4, 4), (("down_proj", Scheme(4, 4, hadamard=True)),))
    kinds = [site.kind for site in plan_block(model, 0, schemes).sites]
    assert "up_down" not in kinds and "norm" in kinds and "value_output" in kinds
    whole = plan_block(model, 0, Schemes(Scheme(4, 4, hadamard=True)))
    assert [site.kind for site in whole.sites] == ["query_key"]


def test_a_few_large_channels_cost_less(make_model, token_ids, tmp_path):
    """What the option is for: a channel of down_proj's input that is far above all others."""
    losses = {}
    for name in ("W8A4", "W8A4-hadamard"):
        module = make_model("llama", intermediate_size=64)
        with torch.no_grad():
            for layer in module.model.layers:
                layer.mlp.up_proj.weight[3] *= 100
                layer.mlp.down_proj.weight[:, 3] /= 100
        run = quantize(
            module,
            "W8A8",
            scheme_for={"mlp.down_proj": name},
            calibration=token_ids(2, 16),
            epochs=0,
            precision="float32",
            report=False,
            output_dir=str(tmp_path / name),
        )
        losses[name] = [record.final_loss for record in run.folder.records()]
    assert all(own < 0.9 * other for other, own in zip(*losses.values(), strict=True))


@pytest.mark.parametrize(
    ("schemes", "words"),
    [
        ((("gate_up_proj.gate", ROTATED),), ("its parts read one input", "-hadamard")),
        ((("mlp", ROTATED),), ("blocks of 4", "leave it out", "W4A16")),
    ],
)
def test_what_cannot_be_multiplied_is_refused(schemes, words, make_model, make_bench):
    module = make_model("phi3", intermediate_size=36)
    bench = make_bench(module, plan=Plan(Schemes(Scheme(4, 16), schemes)))
    with pytest.raises(LRQuantError) as caught:
        bench.runner(0, bench.view(0, bench.stored(0)))
    assert all(word in str(caught.value) for word in words)


def test_weights_in_floating_point_are_refused():
    with pytest.raises(LRQuantError, match="give weights below 16 bits"):
        Scheme.parse("W16A4-hadamard")


def test_queries_and_keys_in_floating_point_are_refused():
    with pytest.raises(LRQuantError, match="give Q, K and V below 16 bits"):
        Scheme.parse("W4A4-qkv16-r3")


@pytest.mark.parametrize(
    "name",
    ["W4A4-hadamard", "W4A4-qkv16-hadamard", "W4A8g32-sym-hadamard", "W4A16-qkv4-r3-hadamard"],
)
def test_names_are_read_back(name):
    scheme = Scheme.parse(name)
    assert scheme.hadamard and scheme.qk_hadamard == ("r3" in name)
    assert scheme.name == name and "Hadamard" in scheme.describe()
    assert Scheme(**scheme.to_dict()) == scheme and "hadamard" not in Scheme(4, 4).to_dict()
