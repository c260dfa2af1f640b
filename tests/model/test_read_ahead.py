"""The next block, which the system is told to read while one is learned."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lrquant.blocks.plan import FULL_PRECISION
from lrquant.blocks.workbench import Workbench
from lrquant.model.loading import load_model

pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no posix_fadvise here")


@pytest.fixture
def asked(monkeypatch) -> list[bytes]:
    """What lies where the system is told to read, with the length of it."""
    contents: list[bytes] = []

    def advise(file: int, offset: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        contents.append(os.pread(file, length, offset))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    return contents


def stored_of_block(folder: Path, start: str) -> list[bytes]:
    stored = load_file(folder / "model.safetensors").items()
    tensors = [tensor.view(-1) for name, tensor in stored if name.startswith(start)]
    return [tensor.view(torch.uint8).numpy().tobytes() for tensor in tensors]


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt_oss"])
def test_while_a_block_is_read_the_stored_tensors_of_the_next_are_asked_for(
    family, model_folder, asked
):
    folder = model_folder(family)
    model = load_model(str(folder))
    bench = Workbench(model, torch.device("cpu"), torch.float32, "host", plan=FULL_PRECISION)
    asked.clear()
    bench.stored(0)
    assert sorted(asked) == sorted(stored_of_block(folder, "model.layers.1."))
    asked.clear()
    bench.stored(len(model.blocks) - 1)
    assert not asked


def test_where_the_system_cannot_be_told_nothing_is_asked(model_folder, monkeypatch):
    monkeypatch.delattr(os, "posix_fadvise")
    load_model(str(model_folder("llama"))).read_ahead(0)
