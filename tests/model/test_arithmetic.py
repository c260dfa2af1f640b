"""What torch is told of CUDA's arithmetic, and what it had been told before; without a GPU."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers.models.auto.configuration_auto import model_type_to_module_name

from lrquant.architectures import language_parts
from lrquant.blocks.plan import FULL_PRECISION
from lrquant.blocks.workbench import make_workbench
from lrquant.config.groups import Computing
from lrquant.errors import LRQuantError
from lrquant.model.arithmetic import full_precision_sums, prepare_repeatable, repeatable
from lrquant.model.loading import from_module

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PRODUCTS, CONVOLUTIONS = torch.backends.cuda.matmul, torch.backends.cudnn


def precision():
    reduced = PRODUCTS.allow_bf16_reduced_precision_reduction
    return PRODUCTS.allow_tf32, CONVOLUTIONS.allow_tf32, reduced


def test_sums_are_in_full_precision_meanwhile():
    before = precision()
    with full_precision_sums():
        assert precision() == (False, False, False)
    assert precision() == before != (False, False, False)


@pytest.fixture
def allowed():
    """A process that allows TF32, told in the older way or in the newer one."""
    before = PRODUCTS.fp32_precision
    yield
    PRODUCTS.allow_tf32, PRODUCTS.fp32_precision = False, before


@pytest.mark.parametrize("name, value", [("allow_tf32", True), ("fp32_precision", "tf32")])
def test_what_a_process_allows_is_allowed_again(allowed, name, value):
    setattr(PRODUCTS, name, value)
    with full_precision_sums():
        assert not PRODUCTS.allow_tf32 and PRODUCTS.fp32_precision == "ieee"
    assert getattr(PRODUCTS, name) == value


def test_kernels_are_repeatable_on_cuda_alone():
    with repeatable(CPU):
        assert not torch.are_deterministic_algorithms_enabled()
    with repeatable(CUDA):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.parametrize("deterministic", [True, False])
def test_learning_is_so_where_it_is_asked_for(deterministic, make_bench, make_model):
    bench = replace(make_bench(make_model("llama")), device=CUDA, deterministic=deterministic)
    with bench.learning():
        assert torch.are_deterministic_algorithms_enabled() is deterministic


@pytest.mark.parametrize(
    "said, mend",
    [
        (
            "cumsum_cuda_kernel does not have a deterministic implementation, but you set",
            r"cumsum_cuda_kernel gives other last digits .* use --no-deterministic",
        ),
        (
            "not deterministic because it uses CuBLAS: set CUBLAS_WORKSPACE_CONFIG=:16:8",
            r"set CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment, or use --no-deterministic",
        ),
    ],
)
def test_what_torch_cannot_repeat_is_refused_with_its_mend(said, mend):
    with pytest.raises(LRQuantError, match=mend), repeatable(CUDA):
        raise RuntimeError(said)
    assert not torch.are_deterministic_algorithms_enabled()


def test_other_errors_stay_as_they_are():
    with pytest.raises(RuntimeError, match="shapes"), repeatable(CUDA):
        raise RuntimeError("shapes")


def test_the_environment_is_prepared_for_cuda_unless_it_says_how(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    prepare_repeatable(CPU)
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    prepare_repeatable(CUDA)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    prepare_repeatable(CUDA)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")


def adds_up_along_tokens(kind: str) -> bool:
    """Whether transformers' code of a text model has a running sum of anything but integers."""
    name = model_type_to_module_name(kind)
    spec = find_spec(f"transformers.models.{name}.modeling_{name}")
    lines = Path(spec.origin).read_text(encoding="utf-8").splitlines() if spec else []
    owner, sums = "", []
    for line in lines:
        owner = line if line.startswith("class ") else owner
        if "cumsum(" in line and not line.lstrip().startswith("#") and "Audio" not in owner:
            sums.append(line)
    return any(not re.search("mask|image|vision|int", line) for line in sums)


def test_families_that_add_up_along_tokens_are_declared_so():
    text = {kind: family for kind, family in language_parts().items() if family.tower is None}
    declared = {kind: family.cumulative for kind, family in text.items()}
    assert declared == {kind: adds_up_along_tokens(kind) for kind in declared}
    assert declared["qwen3_5_text"] and not declared["llama"]


@pytest.mark.parametrize("family", ["llama", "qwen3_5"])
def test_what_cannot_repeat_on_cuda_is_not_held_to_it(family, make_model):
    model = from_module(make_model(family))
    bench = make_workbench(model, FULL_PRECISION, Computing("cpu", "float32", "auto"))
    assert model.repeatable is bench.deterministic is (family == "llama")
