"""A run's identity: which other settings are those of another run."""

from __future__ import annotations

import pytest

from lrquant import LRQuantError, quantize


@pytest.fixture
def learn(make_model, token_ids, tmp_path):
    def run(*patterns: str, **settings):
        return quantize(
            make_model("llama"),
            "W4A16",
            samples=token_ids(2, 12),
            scheme_for=patterns,
            output_dir=str(tmp_path / "run"),
            **{"epochs": 1, "precision": "float32", "report": False, **settings},
        )

    return run


def test_patterns_in_another_order_are_another_run(learn, tmp_path):
    """The last that fits counts, so that their order says which bits a matrix has."""
    patterns = "layers.0=W8A16", "mlp.down_proj=W3A16"
    learn(*patterns)
    resume = str(tmp_path / "run")
    learn(*patterns, resume=resume)
    with pytest.raises(LRQuantError, match=r"its schemes differs: the run has \['layers\.0=W8A16"):
        learn(*reversed(patterns), resume=resume)
    with pytest.raises(LRQuantError, match="its schemes differs"):
        learn(patterns[0], resume=resume)
