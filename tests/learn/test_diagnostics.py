"""Figures of a block: equal to those that whole models and plain torch give."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn import functional

from lrquant import pipeline, quantize
from lrquant.blocks.view import BlockView
from lrquant.blocks.workbench import learned_view
from lrquant.learn.diagnostics import (
    PICTURE_CHANNELS,
    PICTURE_TOKENS,
    WEIGHT_BINS,
    largest_magnitudes,
    run_lengths,
    weight_histogram,
)

TOKENS = 16


@pytest.fixture
def learn(make_model, token_ids, tmp_path, monkeypatch):
    """A run of a tiny model with its model; the page of the report is left out."""
    monkeypatch.setattr(pipeline, "write_report", lambda folder: "nowhere")

    def run(family="llama", scheme="W3A16", samples=4, **settings):
        model = make_model(family)
        defaults = {"epochs": 2, "precision": "float32", "output_dir": str(tmp_path / "run")}
        ids = token_ids(samples, TOKENS)
        return model, quantize(model, scheme, calibration=ids, **(defaults | settings))

    return run


def figures(run, block=0):
    return run.folder.load_diagnostics(block)[0]


def decibels(output, reference):
    """10 log10 of the reference's energy over the error's."""
    noise = (output.double() - reference.double()).square().sum()
    return float(10 * torch.log10(reference.double().square().sum() / noise))


@torch.no_grad()
def seen_by(model, ids, block=0):
    """What a model's own block reads and gives: inputs and outputs of its linears, its output."""
    inputs, outputs, handles = {}, {}, []
    layer = model.model.layers[block]
    for name, module in layer.named_modules():
        if isinstance(module, torch.nn.Linear):

            def keep(module, read, output, name=name):
                inputs[name], outputs[name] = read[0], output

            handles.append(module.register_forward_hook(keep))
    handles.append(layer.register_forward_hook(lambda m, i, o: outputs.update(block=o)))
    model(ids)
    for handle in handles:
        handle.remove()
    return inputs, outputs


@torch.no_grad()
def test_ratios_cosine_and_errors_equal_those_of_whole_models(learn, token_ids):
    model, run = learn(epochs=0)
    ids, found = token_ids(4, TOKENS), figures(run)
    quantized = copy.deepcopy(model)
    view = learned_view(run.workbench, run.folder, 0)
    tensors = view.freeze().tensors(torch.float32)
    quantized.model.layers[0].load_state_dict(tensors)
    _, expected = seen_by(model, ids)
    inputs, outputs = seen_by(quantized, ids)
    stored = model.model.layers[0].state_dict()
    assert found["samples"] == 4 and found["tokens"] == found["linear_tokens"] == 4 * TOKENS
    assert found["linears"].keys() == inputs.keys()
    for name, ratios in found["linears"].items():
        own = functional.linear(inputs[name], stored[f"{name}.weight"])
        for variant in ("learned", "round_to_nearest"):  # epochs 0: the same
            snr = decibels(outputs[name], expected[name])
            assert ratios["snr"][variant] == pytest.approx(snr, abs=1e-3), name
            assert ratios["own_snr"][variant] == pytest.approx(
                decibels(outputs[name], own), abs=1e-3
            )
        assert 0 < ratios["own_snr"]["learned"] < 40
    output, target = outputs["block"], expected["block"]
    cosine = float(functional.cosine_similarity(output, target, dim=-1).mean())
    assert found["cosine"]["learned"] == pytest.approx(cosine, abs=1e-6) and cosine < 0.999
    error = float((output - target).square().sum() / target.square().sum())
    assert found["error"]["learned"] == pytest.approx(error, rel=1e-4)
    assert found["error_made"] == found["error"] and found["error_carried"] < 1e-10


def test_what_is_made_and_what_is_carried_in(learn, token_ids):
    model, run = learn()
    ids, found = token_ids(4, TOKENS), figures(run, 1)
    quantized, half = copy.deepcopy(model), copy.deepcopy(model)
    for block in range(2):
        view = learned_view(run.workbench, run.folder, block)
        tensors = view.freeze().tensors(torch.float32)
        quantized.model.layers[block].load_state_dict(tensors)
        if block == 0:
            half.model.layers[0].load_state_dict(tensors)
    full, homologous, output = (
        seen_by(each, ids, 1)[1]["block"] for each in (model, half, quantized)
    )

    def relative(values, reference):
        return float((values - reference).square().sum() / reference.square().sum())

    assert found["error_carried"] == pytest.approx(relative(homologous, full), rel=1e-3)
    assert found["error_made"]["learned"] == pytest.approx(relative(output, homologous), rel=1e-3)
    assert found["error"]["learned"] == pytest.approx(relative(output, full), rel=1e-3)
    assert found["error_carried"] != pytest.approx(found["error_made"]["learned"], rel=0.1)


def test_losses_equal_those_of_learning(learn):
    """Four samples are the whole set here; round-to-nearest is where a run of no epochs starts."""
    _, plain = learn(epochs=0, scheme="W4A4")
    start = plain.records[0].initial_loss
    _, run = learn(scheme="W4A4", overwrite=True)
    found = figures(run)
    assert found["loss"]["learned"] == pytest.approx(run.records[0].final_loss, rel=1e-5)
    assert found["loss"]["round_to_nearest"] == pytest.approx(start, rel=1e-5)
    assert found["loss"]["learned"] < start and run.records[0].initial_loss != start


def test_few_samples_are_enough(learn):
    _, run = learn(samples=9, batch_size=3, micro_batch_size=3, epochs=1)
    assert figures(run)["samples"] == 6 and figures(run)["tokens"] == 6 * TOKENS


SITES = ("norm", "value_output", "query_key", "up_down")


@pytest.mark.parametrize("family", ["llama", "llama-biases", "qwen2", "opt"])
@pytest.mark.parametrize("sharing", [None, "site", "linear", "none"])
def test_scales_and_shifts_are_undone_before_comparing(learn, monkeypatch, family, sharing):
    """At eight bits little error is left, whatever the learned scales are; else it is all of it."""
    settings = {
        **{"let": True, "lwc": True, "let_sites": SITES, "let_shift": "always", "epochs": 3},
        **{"rotation": sharing is not None, "rotation_sharing": sharing, "overwrite": True},
    }
    _, run = learn(family, "W8A8", **settings)
    ratios = figures(run, 1)["linears"]
    assert all(r["own_snr"]["learned"] > 15 and r["snr"]["learned"] > 15 for r in ratios.values())
    monkeypatch.setattr(BlockView, "in_stored_units", lambda view, name, read, given: (read, given))
    _, wrong = learn(family, "W8A8", **settings)
    assert min(r["own_snr"]["learned"] for r in figures(wrong, 1)["linears"].values()) < 10


def test_pictures_are_the_first_sample_before_and_after(learn, token_ids):
    model, run = learn(let=True, lwc=True)
    found, tensors = run.folder.load_diagnostics(0)
    assert list(found["picture_channels"]) == [
        *("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    ]
    inputs, _ = seen_by(model, token_ids(4, TOKENS))
    before = inputs["self_attn.q_proj"][0].abs().bfloat16()
    assert torch.equal(tensors["inputs.self_attn.q_proj.before"], before)
    scale = run.folder.load_block(0)["let.input_layernorm.scale"]
    after = (inputs["self_attn.q_proj"][0] / scale).abs()
    assert torch.allclose(
        tensors["inputs.self_attn.q_proj.after"].float(), after, rtol=1e-2, atol=1e-6
    )
    assert not torch.equal(tensors["inputs.self_attn.q_proj.after"], before)


def test_an_outlier_survives_down_sampling():
    values = torch.rand(100, 500, generator=torch.Generator().manual_seed(0))
    values[37, 251] = -77.0
    small, (rows, columns) = largest_magnitudes(values), run_lengths(100, 500)
    assert small.shape == (50, 167) and (rows, columns) == (2, 3)
    assert small.shape[0] <= PICTURE_TOKENS and small.shape[1] <= PICTURE_CHANNELS
    assert small[37 // rows, 251 // columns] == 77 and (small == 77).sum() == 1
    assert small[-1, -1] == values[98:, 498:].abs().max().bfloat16()
    assert torch.equal(largest_magnitudes(values[:5, :7]), values[:5, :7].abs().bfloat16())


def test_histograms_hold_everything(learn):
    model, run = learn(scheme="W3A16")
    _, tensors = run.folder.load_diagnostics(0)
    frozen = learned_view(run.workbench, run.folder, 0).freeze()
    for name, linear in frozen.matrices.items():
        weight = model.get_submodule(f"model.layers.0.{name}").weight
        assert tensors[f"weights.{name}"].sum() == weight.numel()
        expected = [(linear.codes == code).sum() for code in range(8)]
        assert tensors[f"codes.{name}.learned"].tolist() == expected
        assert tensors[f"codes.{name}.round_to_nearest"].sum() == weight.numel()
    assert any(
        not torch.equal(tensors[f"codes.{n}.learned"], tensors[f"codes.{n}.round_to_nearest"])
        for n in frozen.matrices
    )


def test_the_bins_of_weights_are_standard_deviations():
    weight = torch.randn(100, 1000, generator=torch.Generator().manual_seed(0)) * 0.02
    weight[0, 0] = 5.0
    counts = weight_histogram(weight)
    middle = counts[WEIGHT_BINS // 2 - 8 : WEIGHT_BINS // 2 + 8].sum() / counts.sum()
    assert counts[-1] == 1 and counts.sum() == weight.numel()
    within = (weight.abs() < weight.std()).double().mean()
    assert float(middle) == pytest.approx(float(within), abs=1e-3) and within > 0.6


def test_symmetric_codes_and_floating_weights(learn):
    _, run = learn(scheme="W4A16-sym", epochs=1)
    _, tensors = run.folder.load_diagnostics(0)
    assert len(tensors["codes.mlp.up_proj.learned"]) == 16
    _, run = learn(scheme="W16A4", epochs=1, overwrite=True)
    found, tensors = run.folder.load_diagnostics(0)
    assert not any(name.startswith("codes.") for name in tensors)
    assert all(math.isfinite(r["own_snr"]["learned"]) for r in found["linears"].values())


def test_no_error_has_no_ratio(learn):
    _, run = learn(scheme="W16A16", epochs=0)
    ratios = figures(run)["linears"]["mlp.up_proj"]
    assert ratios["snr"]["learned"] is None and figures(run)["error"]["learned"] < 1e-10
