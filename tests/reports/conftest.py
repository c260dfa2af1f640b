"""Finished runs of tiny models to report on; not to be changed by a test."""

from __future__ import annotations

import shutil

import pytest

from lrquant import quantize

EVIL = '<img src=x onerror="alert(1)">&amp; |$a_b$*'
TOKENS = 16


@pytest.fixture(scope="session")
def report_data(make_set):
    return make_set(lambda split, number: f"{split} {number * number}", 80)


@pytest.fixture(scope="session")
def make_run(make_model, tiny_tokenizer, report_data, tmp_path_factory):
    """make_run(folder name, family, **settings) -> a Run of three blocks."""

    def make(name, family="llama", **settings):
        defaults = {
            **{"scheme": "W4A4", "lr_plus": True, "epochs": 3, "precision": "float32"},
            **{"nsamples": 3, "seqlen": TOKENS, "limit": 3, "data_dir": str(report_data)},
        }
        return quantize(
            make_model(family, num_hidden_layers=3),
            tokenizer=tiny_tokenizer,
            output_dir=str(tmp_path_factory.mktemp("runs") / name),
            **(defaults | settings),
        )

    return make


@pytest.fixture(scope="session")
def full_run(make_run):
    """With everything that is measured, under a name that wants to be escaped."""
    measures = {"ppl": ("wikitext2",), "agreement": ("wikitext2",), "compare": True, "tta": True}
    return make_run("full", net=EVIL, **measures)


@pytest.fixture(scope="session")
def older_run(make_run, tmp_path_factory):
    """As an earlier version left it: no figures of blocks, no results."""
    run = make_run("older", report=False, lr_plus=False)
    (run.folder.path / "results.json").unlink()
    assert not (run.folder.path / "diagnostics").exists()
    return run


@pytest.fixture
def copied(full_run, tmp_path):
    """A copy of the full run that a test may change."""
    return shutil.copytree(full_run.folder.path, tmp_path / "copied")
