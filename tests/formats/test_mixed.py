"""Other bits for some matrices: every format holds what was learned, plain loaders compute it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from lrquant import LRQuantError, evaluate, quantize
from lrquant.blocks.workbench import learned_view
from lrquant.formats.verification import verify
from lrquant.preflight.checks import preflight
from lrquant.reports.inspection import inspect_folder
from lrquant.reports.preflight import preflight_text

DOWN, ENDS = "mlp.down_proj=W4A16g16-sym", "layers.0=W8A16g16-sym"
LEFT = "layers.1.self_attn.o_proj=W16A16"
WEIGHTS = ("W3A16g16-sym", (DOWN, ENDS, LEFT))
TOKENS = ("W4A4", ("mlp.down_proj=W8A8", "layers.1=W4A8g16", LEFT))
ATTENTIONS = ("W8A4", ("layers.1=W8A16", "layers.2=W16A16"))
CPU = torch.device("cpu")
SHAPE = {"num_hidden_layers": 4, "intermediate_size": 64}


@pytest.fixture
def learn(make_model, token_ids, tmp_path):
    def run(scheme, patterns, family="llama", **settings):
        return quantize(
            make_model(family, **(SHAPE if family == "llama" else {})),
            scheme,
            scheme_for=patterns,
            calibration=token_ids(3, 16),
            output_dir=str(tmp_path / "run"),
            **{
                "precision": "float32",
                "overwrite": True,
                "report": False,
                "epochs": 1,
                "save_dir": str(tmp_path / "saved"),
                **settings,
            },
        )

    return run


ALONE = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
assert not any(name.split(".")[0] == "lrquant" for name in sys.modules)
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])
"""


@pytest.mark.parametrize("form", ["compressed-tensors", "dequantized"])
def test_transformers_alone_computes_what_was_learned(learn, token_ids, tmp_path, form):
    """In a process of its own that never imports this package, and hears no warning."""
    run = learn(*WEIGHTS, format=form)
    torch.save(token_ids(2, 20), tmp_path / "ids.pt")
    arguments = [tmp_path / "saved", tmp_path / "ids.pt", tmp_path / "logits.pt"]
    process = subprocess.run(
        [sys.executable, "-c", ALONE, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    with torch.no_grad():
        learned = run.load_model()(token_ids(2, 20)).logits
    assert torch.allclose(torch.load(tmp_path / "logits.pt"), learned, atol=1e-5)
    assert "match" not in process.stderr, process.stderr


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
@pytest.mark.parametrize("mix", [WEIGHTS, TOKENS, ATTENTIONS], ids=["weights", "tokens", "qkv"])
def test_the_native_format_computes_what_was_learned(learn, token_ids, tmp_path, mix, family):
    scheme, patterns = mix
    if family == "opt":
        patterns = tuple(
            p.replace("mlp.down_proj", "fc2").replace("o_proj", "out_proj") for p in patterns
        )
    if family != "llama":
        patterns = tuple(p for p in patterns if not p.startswith("layers.2"))
    run = learn(scheme, patterns, family, format="lrquant")
    ids = token_ids(2, 20)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    with torch.no_grad():
        learned, loaded = run.load_model()(ids).logits, saved(ids).logits
    assert torch.allclose(loaded, learned, atol=2e-4 * float(learned.abs().max()))


@pytest.mark.parametrize("mix", [TOKENS, ATTENTIONS], ids=["tokens", "qkv"])
def test_a_module_in_memory_computes_as_blocks_do(learn, token_ids, mix, tmp_path, monkeypatch):
    """Perplexity is taken block by block, `load_model` is one module: both are one model."""
    run = learn(*mix, save_dir=None)
    ids = token_ids(2, 20)
    with torch.no_grad():
        logits = run.load_model()(ids).logits[:, :-1]
    assert torch.isfinite(logits).all()
    streamed = block_by_block(run, ids)
    assert torch.allclose(logits, streamed, atol=1e-5 * float(streamed.abs().max()))


@torch.no_grad()
def block_by_block(run, ids):
    from lrquant.blocks.head import Head
    from lrquant.blocks.inputs import BlockInputs
    from lrquant.blocks.variants import as_learned
    from lrquant.measures.scoring.predictions import send_through

    bench = run.workbench
    entry = BlockInputs(bench.model, ids, 1, bench.device)
    (stream,) = bench.streams(entry, 1)
    send_through(bench.model, as_learned(bench, run.folder), stream, entry)
    head = Head(bench.model, bench.device, bench.dtype)
    states = torch.cat([stream.read(batch, 0) for batch in entry.batches])
    return head(states)[:, :-1]


@pytest.mark.parametrize(
    ("mix", "form"),
    [(WEIGHTS, "compressed-tensors"), (TOKENS, "lrquant")],
)
def test_what_is_estimated_is_what_is_written(learn, model_folder, tmp_path, mix, form, data_dir):
    scheme, patterns = mix
    folder = model_folder("llama", num_hidden_layers=4)
    settings = {"model": str(folder), "scheme": scheme, "scheme_for": patterns, "epochs": 1}
    settings |= {"output_dir": str(tmp_path / "run"), "save_dir": str(tmp_path / "saved")}
    settings |= {"data_dir": data_dir, "nsamples": 2, "seqlen": 16, "format": form}
    settings |= {"precision": "float32", "report": True}
    checked = preflight(settings)
    assert not checked.failed
    quantize(**settings)
    verified = verify(tmp_path / "saved")
    assert not verified.problems
    assert verified.bits_per_weight == pytest.approx(checked.checkpoint.bits_per_weight)
    said = inspect_folder(tmp_path / "saved")
    assert f"{verified.bits_per_weight:.3f}" in said
    page = (tmp_path / "run" / "report.md").read_text().replace("\\_", "_")
    card = (tmp_path / "saved" / "README.md").read_text()
    for pattern in patterns:
        words = pattern.replace("=", ": ")
        for text in (said, card, page, inspect_folder(tmp_path / "run"), preflight_text(checked)):
            assert words in text
    assert "--scheme-for" in page.replace("_", "-"), "the command that repeats the run"
    measured = evaluate(
        str(tmp_path / "saved"),
        ppl=("wikitext2",),
        **{name: settings[name] for name in ("data_dir", "seqlen", "precision")},
    )
    learned = evaluate(
        str(tmp_path / "run"),
        ppl=("wikitext2",),
        **{name: settings[name] for name in ("data_dir", "seqlen", "precision")},
    )
    pair = [each["perplexity"]["wikitext2"]["quantized"] for each in (measured, learned)]
    assert pair[0] == pytest.approx(pair[1], rel=1e-3)


def test_a_bias_that_a_shift_brings_reaches_a_linear_that_is_left_alone(learn, token_ids, tmp_path):
    shifted = {"let": True, "let_shift": "always", "let_lr": 5e-2, "epochs": 2}
    run = learn("W4A4", ("self_attn.q_proj=W16A16",), format="lrquant", **shifted)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    ids = token_ids(2, 20)
    with torch.no_grad():
        learned, loaded = run.load_model()(ids).logits, saved(ids).logits
    assert saved.model.layers[0].self_attn.q_proj.bias is not None
    assert torch.allclose(loaded, learned, atol=1e-4 * float(learned.abs().max()))


@pytest.mark.parametrize("settings", [{"lr_plus": True}, {"let": True}, {"lwc": True}])
def test_what_is_left_alone_stays_what_it_is(learn, settings):
    """Folded with the norm before it; where nothing reads the norm in codes, bit for bit."""
    patterns = ("layers.0=W16A16", "self_attn=W16A16", "mlp.gate_proj=W16A16")
    run = learn("W4A8", patterns, save_dir=None, **{**settings, "epochs": 3})
    model = run.workbench.model
    for index in (0, 1):
        view = learned_view(run.workbench, run.folder, index)
        own, stored = view.freeze().tensors(torch.float32), model.block_tensors(index, CPU)
        names = [n for n in stored if index == 0 or "self_attn" in n or "input_layernorm" in n]
        for name in names:
            assert torch.equal(own[name], stored[name].float()), name
        norm = "post_attention_layernorm.weight"
        gates = [each["mlp.gate_proj.weight"] * each[norm] for each in (own, stored)]
        assert torch.allclose(*gates, rtol=1e-5)


def test_config_groups_say_what_each_linear_has(learn, tmp_path):
    learn(*WEIGHTS, format="compressed-tensors")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    bits = {
        target: group["weights"]["num_bits"]
        for group in config["config_groups"].values()
        for target in group["targets"]
    }
    assert bits.pop("Linear") == 3
    assert {name for name, width in bits.items() if width == 4} == {
        f"model.layers.{index}.mlp.down_proj" for index in (1, 2, 3)
    }
    assert all(width == 8 for name, width in bits.items() if ".layers.0." in name)
    assert len(bits) == 3 + 7
    assert "model.layers.1.self_attn.o_proj" in config["ignore"]


@pytest.mark.parametrize(
    ("patterns", "target", "said"),
    [
        (("self_attn.q_proj=W4A16g32-sym",), "vllm", "q_proj"),
        (("mlp.up_proj=W4A16g32-sym",), "vllm", "up_proj"),
        (("mlp.down_proj=W4A16g32",), "transformers", "symmetric weights"),
    ],
)
def test_what_a_target_cannot_hold_is_refused_before_learning(
    learn, tmp_path, patterns, target, said
):
    with pytest.raises(LRQuantError, match=said):
        learn("W8A16g32-sym", patterns, target=target)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2", "gemma4"])
def test_blocks_of_several_kinds_have_schemes_of_their_own(name, saved, make_model, token_ids):
    """One without attention names none, whose Q, K and V would have another scheme."""
    folder = saved(name, "W4A4", scheme_for=("layers.0=W8A8",), format="lrquant")
    own = json.loads((folder / "config.json").read_text())["quantization_config"]
    attentions = [each for group in own.get("attentions", []) for each in group["modules"]]
    assert "model.layers.0.linear_attn" not in attentions
    read = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert torch.isfinite(read(token_ids(1, 8)).logits).all()
