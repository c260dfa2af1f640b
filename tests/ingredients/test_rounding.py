"""Learned rounding: its descent, what it becomes when a block is learned, what is kept of it."""

from __future__ import annotations

import pytest
import torch

from lrquant import LRQuantError, quantize
from lrquant.config.scheme import Scheme
from lrquant.config.schemes import Schemes
from lrquant.ingredients.base.descent import SignDescent
from lrquant.ingredients.rounding import Rounding
from lrquant.numerics.grids.integer import IntegerGrid
from lrquant.numerics.packing import pack_ternary, unpack_ternary
from lrquant.numerics.recipe import Recipe
from lrquant.numerics.weights import quantize_weight


@pytest.mark.parametrize("columns", [1, 4, 5, 6, 48])
def test_steps_in_bytes(columns):
    steps = torch.randint(-1, 2, (7, columns), generator=torch.Generator().manual_seed(columns))
    packed = pack_ternary(steps.float())
    assert packed.dtype == torch.uint8 and packed.shape == (7, -(-columns // 5))
    assert torch.equal(unpack_ternary(packed, columns), steps.to(torch.int8))


def test_the_report_counts_no_padding():
    kept = {"rounding.q.offset": torch.zeros(2, 6), "rounding.k.offset": torch.ones(2, 10) / 2}
    still, moved = Rounding(rounding=True).kept(kept).values()
    assert Rounding.shown("offset", still)[1].tolist() == [0.0, 0.0]
    assert Rounding.shown("offset", moved)[1].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_a_hardened_offset_has_the_same_codes(bits, symmetric):
    """Also of weights that lie on their code, between two, or outside the clipped range."""
    generator = torch.Generator().manual_seed(bits)
    grid = IntegerGrid(bits, 16, symmetric)
    weight = torch.randn(32, 64, generator=generator)
    weight[:, ::5] = 0.0
    clipped = {side: torch.full((32, 4), 0.7) for side in ("upper", "lower")}
    scale = quantize_weight(weight, Recipe(**clipped), grid).scale.repeat_interleave(16, 1)
    weight[:8] = scale[:8] * torch.randint(-2, 3, (8, 64), generator=generator) / 2
    offset = torch.rand(32, 64, generator=generator) - 0.5
    offset[:, 1::3] = offset[:, 1::3].sign() / 2
    codes = quantize_weight(weight, Recipe(offset=offset, **clipped), grid).codes
    nearest = quantize_weight(weight, Recipe(**clipped), grid).codes
    moved = codes - nearest
    assert moved.abs().max() == 1
    (hardened,) = Rounding(rounding=True).hardened("q", moved).values()
    again = quantize_weight(weight, Recipe(offset=hardened, **clipped), grid).codes
    assert torch.equal(again, codes)


def test_the_rate_falls_to_nothing():
    value = torch.zeros(3, requires_grad=True)
    optimizer = SignDescent([value], 0.1, 4)
    places = []
    for _ in range(6):
        value.grad = torch.tensor([2.0, -1e-9, 0.0])
        optimizer.step()
        places.append(value.detach().clone())
    steps = torch.tensor([0.1, 0.175, 0.225, 0.25, 0.25, 0.25])
    expected = torch.stack([-steps, steps, torch.zeros(6)], 1)
    torch.testing.assert_close(torch.stack(places), expected)


def test_it_is_refused_where_no_weight_is_rounded():
    assert "give --wbits below 16" in Rounding.refusal(Schemes(Scheme(16, 8)))
    assert Rounding.refusal(Schemes(Scheme(4))) is None


@pytest.fixture
def learn(make_model, token_ids, tmp_path):
    def run(name, **settings):
        return quantize(
            make_model("llama"),
            "W2A16g16",
            calibration=token_ids(4, 24),
            output_dir=str(tmp_path / name),
            **{"epochs": 4, "precision": "float32", "lwc": True, "rounding": True, **settings},
        )

    return run


def test_it_learns_more_than_the_rest_and_is_resumed_byte_for_byte(learn, tmp_path):
    plain, run = learn("plain", rounding=False), learn("run")
    last = -1
    assert run.records[last].final_loss < 0.95 * plain.records[last].final_loss
    assert "rounding (sign descent, lr 1 / steps, falling to 0)" in run.results["method"]
    files = sorted((tmp_path / "run" / "blocks").iterdir())
    before = [path.read_bytes() for path in files]
    files[-1].unlink()
    learn("run", resume=str(tmp_path / "run"))
    assert [path.read_bytes() for path in files] == before
    offsets = {n: t for n, t in run.folder.load_block(0).items() if n.startswith("rounding.")}
    assert offsets["rounding.mlp.down_proj.offset"].shape == (32, 10)
    assert all(tensor.dtype == torch.uint8 for tensor in offsets.values())
    assert "Learned rounding" in (tmp_path / "run" / "report.html").read_text()


def test_windows_and_checkpoints_hold_it(learn, tmp_path, token_ids):
    saved = {"save_dir": str(tmp_path / "saved"), "format": "dequantized", "report": False}
    run = learn("run", window=2, **saved)
    from transformers import AutoModelForCausalLM

    read = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    ids = token_ids(2, 12)
    torch.testing.assert_close(read(ids).logits, run.load_model()(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_rate_out_of_range_is_refused(learn):
    with pytest.raises(LRQuantError, match="rounding_lr"):
        learn("run", rounding_lr=-1.0)
