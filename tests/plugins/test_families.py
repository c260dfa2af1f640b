"""Families of another package: fused projections and experts are matrices like any other.

They pass the contract of this package's own, and mistakes in them do not.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lrquant import quantize
from lrquant.architectures import architectures, decoder
from lrquant.errors import LRQuantError
from lrquant.model.loading import from_module
from lrquant.preflight.checks import preflight
from lrquant.reports.inspection import inspect_folder

PAGE = "add-an-architecture.md"
CONTRACT = Path(__file__).parents[1] / "architectures"
NAMES = pytest.mark.parametrize("name", ["fused", "experts"])
MISTAKES = {  # in the page's text: what is changed, and the tests that see it
    "outside-fused": (
        ('f"{qkv}.q", f"{qkv}.k", f"{qkv}.v"', 'f"{qkv}.q", f"{qkv}.k"'),
        {"folding_leaves_the_function_unchanged", "the_block_view_folds_the_same_way"},
    ),
    "outside-experts": (
        ('"down_proj", count', '"down_proj", count - 1'),
        {"every_weight_is_declared_exactly_once", "sites_fit_the_matrices"},
    ),
}


@pytest.fixture
def contract(process):
    """contract(place) -> the contract of the families that are installed there, run."""
    own = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line", CONTRACT)
    return lambda place: process((*own, "-k", "outside- or tiny_config"), place)


def test_they_keep_the_contract(installed, contract):
    ended = contract(installed(PAGE))
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_mistakes_in_them_break_it(installed, contract):
    place = installed(PAGE)
    code = (place / "toy_family.py").read_text()
    for (right, wrong), _ in MISTAKES.values():
        assert code.count(right) == 1
        code = code.replace(right, wrong)
    (place / "toy_family.py").write_text(code)
    ended = contract(place)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    for variant, (_, tests) in MISTAKES.items():
        failed = re.findall(rf"^FAILED .*::test_(\w+)\[{variant}", ended.stdout, re.M)
        assert tests <= set(failed), variant


@pytest.fixture
def make_family(installed, make_model):
    """make_family(name) -> a random model of a family of the page."""
    installed(PAGE)
    return lambda name, **changes: make_model(f"outside-{name}", **changes)


@NAMES
@pytest.mark.parametrize(
    "settings",
    [{"lwc": True, "let": True}, {"lr_plus": True}, {"scheme_for": ("layers.1=W8A16g16",)}],
    ids=["both", "plus", "mixed"],
)
def test_a_run_is_learned_written_and_read_back(name, settings, make_family, token_ids, tmp_path):
    module, ids = make_family(name), token_ids(3, 16)
    run = quantize(
        module,
        "W4A16g16",
        calibration=ids,
        output_dir=str(tmp_path / "run"),
        save_dir=str(tmp_path / "saved"),
        format="dequantized",
        **{"epochs": 1, "precision": "float32", **settings},
    )
    assert all(record.final_loss <= record.initial_loss for record in run.records)
    learned = run.load_model()(ids).logits
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    torch.testing.assert_close(read(ids).logits, learned, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(module(ids).logits, learned, atol=1e-3), "nothing was quantised"
    names = set(run.folder.load_block(0))
    part = "qkv_proj.v" if name == "fused" else "experts.3.down"
    assert any(part in key for key in names)


def linear_cells(report: str) -> list[list[str]]:
    """The table of all linears by block in a report.md: its head, then its rows."""
    head, _, *rows = (
        report.partition("each linear's output\n\n")[2].partition("\n\n")[0].split("\n")
    )
    return [
        [cell.strip().replace("\\_", "_") for cell in row.strip("|").split("|")]
        for row in (head, *rows)
    ]


@pytest.mark.parametrize("dense", [0, 2])
def test_blocks_unlike_each_other_from_learning_to_inspection(
    dense, make_family, tiny_tokenizer, token_ids, tmp_path
):
    ids, folder, saved = token_ids(3, 16), tmp_path / "run", tmp_path / "saved"
    run = quantize(
        make_family("unlike", mlp_only_layers=[dense]),
        "W4A4",
        calibration=ids,
        tokenizer=tiny_tokenizer,
        output_dir=str(folder),
        save_dir=str(saved),
        format="lrquant",
        scheme_for=("mlp.experts=W16A16",),  # which neither the format nor W4A4 can hold
        **{"epochs": 1, "precision": "float32", "lwc": True, "let": True},
    )
    assert len(run.records) == 3 and "3 of 3 blocks, finished" in inspect_folder(folder)
    learned = run.load_model()(ids).logits
    read = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32).eval()
    torch.testing.assert_close(read(ids).logits, learned, rtol=1e-4, atol=1e-4)
    assert "verified: hashes" in inspect_folder(saved)
    cells = linear_cells((folder / "report.md").read_text())
    assert cells[0] == ["block", *decoder.LINEARS]
    for block, row in enumerate(cells[1:]):
        assert [" → " in cell for cell in row[1:]] == [True] * 4 + [block == dense] * 3
    page = (folder / "report.html").read_text()
    assert "mlp.up_proj</th>" in page and "Error that each linear adds" in page


def test_one_expert_and_one_part_have_their_own_bits(make_family, token_ids, tmp_path):
    for name, pattern, parameter in (
        ("fused", "qkv_proj.v", "self_attn.qkv_proj.weight"),
        ("experts", "experts.2", "mlp.experts.gate_up_proj"),
    ):
        model = from_module(make_family(name))
        run = quantize(
            make_family(name),
            "W2A16",
            calibration=token_ids(2, 12),
            output_dir=str(tmp_path / name),
            scheme_for=(f"{pattern}=W16A16",),
            **{"epochs": 0, "precision": "float32"},
        )
        stored = model.block_tensors(0, torch.device("cpu"))[parameter]
        frozen = run.workbench.view(0, run.workbench.stored(0)).freeze()
        tensor = frozen.tensors(torch.float32)[parameter]
        kept = [m for m in model.matrices(0) if m.parameter == parameter and pattern in m.name]
        moved = [m for m in model.matrices(0) if m.parameter == parameter and m not in kept]
        assert all(torch.equal(m.of(tensor), m.of(stored)) for m in kept) and kept
        assert not any(torch.equal(m.of(tensor), m.of(stored)) for m in moved)


def test_what_a_format_of_linears_cannot_hold_is_refused(make_family, token_ids, tmp_path):
    for name, scheme_for, said in (
        ("experts", (), "holds several matrices in one tensor"),
        ("fused", ("qkv_proj.v=W8A16-sym",), "its parts have several schemes"),
    ):
        with pytest.raises(LRQuantError, match=said):
            quantize(
                make_family(name),
                "W4A16-sym",
                calibration=token_ids(1, 12),
                output_dir=str(tmp_path / name),
                save_dir=str(tmp_path / f"{name}-saved"),
                scheme_for=scheme_for,
            )
        assert not (tmp_path / name).exists()


def test_inputs_that_nothing_tells_of_cannot_be_quantised(make_family, token_ids, tmp_path):
    """As of experts that a family computes in its own code."""
    module = make_family("experts")
    whole = architectures()["qwen3_moe"]

    def matrices(config, block):
        own = whole.matrices(config, block)
        return tuple(
            replace(m, reads=None) if m.reads == m.name and m.expert is not None else m for m in own
        )

    own_code = replace(whole, matrices=matrices)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lrquant.model.loading.architecture_of", lambda config: own_code)
        with pytest.raises(
            LRQuantError, match=r"experts\.0\.down.*: its inputs stay inside .*W4A16'"
        ):
            quantize(module, "W4A8", calibration=token_ids(1, 12), output_dir=str(tmp_path))


def test_experts_declared_by_attention_alone_are_refused(make_family, toys, monkeypatch):
    module = make_family("experts")
    whole = architectures()["qwen3_moe"]
    only = replace(
        whole, matrices=lambda config, block: whole.matrices(config, block)[:4], kept=lambda *a: ()
    )
    monkeypatch.setattr("lrquant.model.loading.architecture_of", lambda config: only)
    with pytest.raises(LRQuantError, match=r"mlp\.experts\.gate_up_proj of block 0, .* neither"):
        from_module(module)


def test_blocks_that_differ_are_estimated(make_family, tiny_tokenizer, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("some words, and some more of them. " * 20)
    module = make_family("unlike", num_hidden_layers=4, mlp_only_layers=[0, 2])
    settings = {"scheme": "W4A16g16", "precision": "float32", "output_dir": str(tmp_path / "run")}
    settings |= {"calib_dataset": str(text), "nsamples": 2, "seqlen": 16, "epochs": 1}
    checked = preflight({**settings, "ppl": (str(text),)}, from_module(module, tiny_tokenizer))
    assert not checked.failed, checked.failed
    assert [each.blocks for each in checked.costs] == [(0, 2), (1, 3)]
    assert all(each.costs.step > 0 for each in checked.costs)
    assert checked.seconds.learning > 0 and checked.seconds.measuring > 0
