"""The native format is known to transformers, whichever of the two packages is imported first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import lrquant

SOURCE = Path(lrquant.__file__).parents[1]
ORDERS = {
    "this package first": "import lrquant",
    "transformers first": "from transformers import AutoModelForCausalLM; import lrquant",
    "transformers' models by way of another library": "import lrquant, compressed_tensors",
    "what registers it, by its own name": "import lrquant.runtime.loading",
}
LOAD = """
import inspect, sys
from transformers import AutoModelForCausalLM
from transformers.quantizers import auto
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model.model.layers[0].mlp.up_proj).__name__ == "IntegerLinear"
"""
NOTHING_BETWEEN = """
assert not any(type(f).__module__ == "lrquant.runtime.registration" for f in sys.meta_path)
assert auto.__loader__ is auto.__spec__.loader
assert type(auto.__loader__).__name__ == "SourceFileLoader"
assert inspect.getsource(auto.AutoHfQuantizer)
"""


@pytest.fixture
def outcome(saved):
    """Run a program in a process of its own on a native checkpoint: exit code and what it said."""

    def run(program):
        folder = saved("llama", "W4A4", format="lrquant")
        ended = subprocess.run(
            [sys.executable, "-c", program, str(folder)],
            **{"capture_output": True, "text": True, "cwd": SOURCE},
        )
        return ended.returncode, ended.stderr

    return run


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_a_native_checkpoint_is_loaded(outcome, order):
    """After that transformers' module is as if nothing had ever stood before its import."""
    code, error = outcome(order + LOAD + NOTHING_BETWEEN)
    assert code == 0, error


def test_transformers_alone_does_not_know_the_format(outcome):
    code, error = outcome(LOAD)
    assert code == 1 and error.splitlines()[-1] == "AssertionError"
