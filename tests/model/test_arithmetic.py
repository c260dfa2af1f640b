"""What torch is told of CUDA's arithmetic, and what it had been told before; without a GPU."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from lrquant.errors import LRQuantError
from lrquant.model.arithmetic import full_precision_sums, prepare_repeatable, repeatable

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
