"""Shared by the tests of formats.

``tensors_of``       tensors_of(folder) -> every tensor of a checkpoint, through its index
``learned_linears``  learned_linears(run, index) -> the frozen linears of a block of a run
"""

from __future__ import annotations

import json

import pytest
from safetensors import safe_open

from lrquant.blocks.workbench import learned_view
from lrquant.formats.checkpoint import INDEX


def _tensors_of(folder):
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    found = {}
    for name in sorted(set(index.values())):
        with safe_open(folder / name, framework="pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert found.keys() == index.keys()
    return found


@pytest.fixture(scope="session")
def tensors_of():
    return _tensors_of


def _learned_linears(run, index):
    return learned_view(run.workbench, run.folder, index).freeze().matrices


@pytest.fixture(scope="session")
def learned_linears():
    return _learned_linears
