"""A format and a term of the loss of another package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import lrquant
from lrquant import quantize
from lrquant.errors import LRQuantError

CONTRACT = Path(__file__).parents[1] / "formats" / "test_contract.py"


@pytest.fixture
def contract(installed):
    """contract(change) -> pytest's exit and words on the format of the page, after an edit of it"""
    place = installed("add-an-export-format.md")
    source = Path(lrquant.__file__).parents[1]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(place), str(source)])

    def run(before: str = "", after: str = "") -> subprocess.CompletedProcess[str]:
        (module,) = place.glob("toy_*.py")
        text = module.read_text()
        assert before in text
        module.write_text(text.replace(before, after, 1))
        command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", str(CONTRACT)]
        command += ["-k", "side-by-side"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    return run


def test_the_format_of_the_page_keeps_the_contract(contract):
    ended = contract()
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_a_format_that_decodes_something_else_does_not(contract):
    ended = contract("(grouped - zero[..., None])", "(grouped - zero[..., None] - 1)")
    assert ended.returncode == 1 and "so it is not what was measured" in ended.stdout, ended.stderr


def test_a_term_of_another_package_is_learned(installed, make_model, token_ids, tmp_path):
    installed("add-a-loss.md")
    run = quantize(
        make_model("llama"),
        "W3A16",
        calibration=token_ids(3, 16),
        output_dir=str(tmp_path),
        **{"loss": "mse+largest", "epochs": 2, "precision": "float32", "dynamic_weights": True},
    )
    assert all(record.initial_loss == pytest.approx(2, rel=1e-2) for record in run.records)
    assert any(record.final_loss < record.initial_loss for record in run.records)


def test_a_term_that_nobody_declares_is_refused(make_model, token_ids, tmp_path):
    with pytest.raises(LRQuantError, match=r"loss 'mse\+odd': use one of mse, nlc"):
        quantize(
            make_model("llama"),
            "W3A16",
            calibration=token_ids(1, 16),
            output_dir=str(tmp_path / "run"),
            loss="mse+odd",
        )
    assert not (tmp_path / "run").exists()
