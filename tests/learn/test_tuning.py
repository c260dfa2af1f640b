"""The end-to-end stage: its gradient, what it keeps, and that the rest of a run takes it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

from lrquant import LRQuantError, quantize
from lrquant.blocks.head import Head
from lrquant.blocks.inputs import BlockInputs
from lrquant.blocks.plan import Plan
from lrquant.blocks.tuned import TunedBlock
from lrquant.config.scheme import Scheme
from lrquant.config.schemes import Schemes
from lrquant.data.feeds import Feed
from lrquant.ingredients.base.statistics import ChannelStatistics
from lrquant.ingredients.factors import ScaleFactors
from lrquant.ingredients.rounding import Rounding
from lrquant.ingredients.tuning import Tuning
from lrquant.learn.share import Share
from lrquant.learn.tuning import tuned
from lrquant.learn.whole_model import TunedSamples, WholeFit
from lrquant.numerics.losses import kl_divergence
from lrquant.runs.folder import RunFolder

TUNING = Tuning(tune=True, tune_lr=0.02, tune_epochs=3)
ROUNDING = dataclasses.replace(TUNING, tune_rounding=True, tune_rounding_lr=0.05)
OWN = {"epochs": 1, "precision": "float32", "tune": True, "tune_lr": 0.02}
FACTORS = ScaleFactors(rotation=True, rotation_sharing="linear")


@pytest.fixture
def whole(make_model, make_bench, token_ids):
    """whole(family, scheme) -> a model, its views and blocks to tune, and samples."""

    def make(family, scheme, tuning=TUNING):
        bench = make_bench(make_model(family))
        plan = Plan(Schemes(scheme), (FACTORS, Rounding(rounding=True), tuning))
        bench = dataclasses.replace(bench, plan=plan)
        entry = BlockInputs(bench.model, Feed.of_tokens(token_ids(2, 12)), 1, bench.device)
        first, target = bench.streams(entry, 2)
        entry.embed(first)
        generator = torch.Generator().manual_seed(1)
        target.states.copy_(torch.randn(target.states.shape, generator=generator))
        blocks = []
        for index in range(len(bench.model.blocks)):
            view = bench.view(index, bench.stored(index))
            view.initialize(ChannelStatistics())
            for name, values in view.parameters.items():
                moved = 0.1 * torch.randn(values.shape, generator=generator)
                if not name.startswith("tuned."):
                    view.parameters[name] = values + moved
            view.harden_()
            blocks.append((view, TunedBlock(tuning, view, bench.runner(index, view))))
        return bench, blocks, TunedSamples(entry, Share.alone(2), first, target)

    return make


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_a_tuned_block_computes_what_its_view_does(whole, family):
    _, blocks, _ = whole(family, Scheme(3, 8, 16))
    for view, block in blocks:
        moved = {name: 1 + 0.1 * torch.rand(t.shape) for name, t in block.factors.items()}
        block.factors = moved
        view.parameters |= moved
        expected, tensors = view.freeze().tensors(torch.float32), block.tensors()
        assert tensors.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(tensors[name], tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "opt", "gemma3n", "gemma4"])  # hand keys and values on
def test_the_gradient_is_that_of_the_divergence(whole, family, monkeypatch):
    """Against differences of the loss itself, forward alone."""
    bench, pairs, samples = whole(family, Scheme(3, 16, 16))
    blocks = [block for _, block in pairs]
    head = Head(bench.model, bench.device, torch.float32)
    fit = WholeFit(blocks, head, TUNING, samples, samples, lambda step: None)
    for factor in (factor for block in blocks for factor in block.factors.values()):
        factor.requires_grad_(True)
    for block in blocks:
        monkeypatch.setattr(block, "step", lambda: None)
    loss = sum(fit._step(0).values())
    with torch.no_grad():
        again = divergence(fit, samples)
    assert loss == pytest.approx(again, rel=1e-6) and loss > 0.1
    for name, parameter in ((n, p) for block in blocks for n, p in block.factors.items()):
        place = parameter.grad.abs().flatten().argmax()
        losses = []
        for step in (1e-2, -1e-2):
            with torch.no_grad():
                parameter.view(-1)[place] += step
                losses.append(divergence(fit, samples))
                parameter.view(-1)[place] -= step
        slope = (losses[0] - losses[1]) / 2e-2
        assert slope == pytest.approx(float(parameter.grad.flatten()[place]), rel=0.05), name


def divergence(fit, samples):
    """Of the first batch, forward alone."""
    (passed,) = fit._through(samples, [0], kept=False)
    return fit._of_logits(passed.inputs.pop(), samples, 0)[0]


def test_the_rounding_is_tuned_too(whole):
    """Codes follow from positions, as the view has them of the shifts; gradients reach both."""
    bench, pairs, samples = whole("llama", Scheme(2, 8, 16), tuning=ROUNDING)
    blocks = [block for _, block in pairs]
    head = Head(bench.model, bench.device, torch.float32)
    fit = WholeFit(blocks, head, ROUNDING, samples, samples, lambda step: None)
    record = fit.run()
    assert record["best_epoch"] > 0 and min(record["held"]) < record["held"][0]
    moved = 0
    for (view, block), best in zip(pairs, fit.best, strict=True):
        view.load(view.kept | best)
        shifts = [t for n, t in view.parameters.items() if n.endswith(".shift")]
        assert len(shifts) == len(view.shapes.quantized)
        moved += sum(int(shift.abs().sum()) for shift in shifts)
        if record["best_epoch"] == ROUNDING.tune_epochs:
            own, frozen = block.tensors(), view.freeze().tensors(torch.float32)
            for name, tensor in frozen.items():
                torch.testing.assert_close(own[name], tensor, rtol=1e-6, atol=1e-6)
    assert moved > 0


def test_divergence_is_that_of_torch():
    generator = torch.Generator().manual_seed(0)
    own, reference = torch.randn(2, 5, 9, generator=generator), torch.randn(2, 5, 9)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=reference),
        torch.distributions.Categorical(logits=own),
    )
    torch.testing.assert_close(kl_divergence(own, reference), expected)
    assert kl_divergence(own, own).abs().max() < 1e-6


@pytest.fixture
def learn(make_model, tiny_tokenizer, token_ids, tmp_path):
    def run(name="run", **settings):
        return quantize(
            make_model("llama"),
            "W2A16g16",
            tokenizer=tiny_tokenizer,
            output_dir=str(tmp_path / name),
            **{
                "calibration": token_ids(9, 16),
                "epochs": 1,
                "precision": "float32",
                "tune": True,
                "tune_lr": 0.02,
                **settings,
            },
        )

    return run


def test_a_run_is_tuned_kept_and_gone_on_with(learn, tmp_path):
    run = learn(tune_epochs=3)
    folder = run.folder
    record = tuned(folder).about(0)["record"]
    assert run.results["end_to_end"] == record
    assert len(record["losses"]) == 3 and len(record["held"]) == 4
    assert record["best_epoch"] > 0 and min(record["held"]) < record["held"][0]
    assert "scales and norms end to end (lr 0.02 falling to 0, 3 epochs)" in run.results["method"]
    files = sorted((tmp_path / "run" / "tuned" / "model").iterdir())
    blocks = sorted((tmp_path / "run" / "blocks").iterdir())
    before = [path.read_bytes() for path in (*files, *blocks)]
    assert len(files) == 2
    plain = learn("plain", tune=False)
    own = [path.read_bytes() for path in sorted((tmp_path / "plain" / "blocks").iterdir())]
    assert len(own) == 2 and not (tmp_path / "plain" / "tuned").exists()
    assert plain.folder.load_block(1).keys() < folder.learned(1).keys()
    stamps = [path.stat().st_mtime_ns for path in files]
    learn(tune_epochs=3, resume=str(folder.path))
    assert [path.stat().st_mtime_ns for path in files] == stamps, "kept"
    files[1].unlink()
    with pytest.raises(LRQuantError, match="not tuned yet; go on with --resume"):
        RunFolder.open(folder.path).require_finished()
    learn(tune_epochs=3, resume=str(folder.path))
    assert [path.read_bytes() for path in (*files, *blocks)] == before
    assert "Tuned scales" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize("rounding", [False, True])
def test_a_checkpoint_and_measures_have_what_was_tuned(learn, token_ids, tmp_path, rounding):
    how = {"tune_rounding": rounding, "tune_rounding_lr": 0.05, "rounding": rounding}
    run = learn(**how)
    shifts = [t for n, t in run.folder.learned(1).items() if n.endswith(".shift")]
    assert len(shifts) == 7 * rounding and all(each.dtype == torch.uint8 for each in shifts)
    assert ("Tuned rounding" in (tmp_path / "run" / "report.html").read_text()) == rounding
    saved = {"save_dir": str(tmp_path / "saved"), "format": "dequantized"}
    learn(resume=str(run.folder.path), **saved, **how)
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    ids = token_ids(2, 12)
    torch.testing.assert_close(read(ids).logits, run.load_model()(ids).logits, rtol=1e-5, atol=1e-5)


def test_samples_of_its_own(tiny_tokenizer, make_model, tmp_path):
    """Drawn apart from those of the blocks, as many as asked for; other ones are another run."""
    text = tmp_path / "text.txt"
    text.write_text("a b c d e f g h i j k l m n o p q r s t u v w x y z " * 40)

    def run(**settings):
        return quantize(
            make_model("llama"),
            "W2A16g16",
            tokenizer=tiny_tokenizer,
            calib_dataset=str(text),
            output_dir=str(tmp_path / "run"),
            **{"nsamples": 4, "seqlen": 16, "report": False, **OWN, **settings},
        )

    first = run(tune_nsamples=9)
    assert len(first.results["end_to_end"]["losses"]) == 2
    log = (tmp_path / "run" / "run.log").read_text()
    assert "4 x 16 = 64 tokens, seed 2" in log and "9 x 16 = 144 tokens, seed 3" in log
    with pytest.raises(LRQuantError, match="tune_nsamples differs"):
        run(tune_nsamples=8, resume=str(first.folder.path))


def test_one_sample_is_not_enough(learn, token_ids):
    with pytest.raises(LRQuantError, match="--tune: 1 calibration sample; give 2 or more"):
        learn(calibration=token_ids(1, 16))


def test_nothing_is_tuned_where_nothing_is_quantised():
    with pytest.raises(LRQuantError, match=r"--tune with W16A16"):
        quantize("nowhere", "W16A16", tune=True)
