"""What a learning step launches, moves and waits for stays below what it has come down to."""

from __future__ import annotations

import pytest
import torch

META = torch.device("meta")
TOKENS = 64
# Of a step of the small shape: launches, and bytes for each weight.  Lower them with what falls.
MOST = {
    ("W4A4", False): (1482, 491),
    ("W4A4", True): (230, 55),
    ("W4A16", False): (753, 269),
    ("W4A16", True): (181, 51),
}


@pytest.fixture
def counted(script):
    roofline, shapes, steps = (script(name) for name in ("roofline", "gpu.shapes", "gpu.steps"))
    methods = {"W4A4": steps.W4A4, "W4A16": steps.W4A16}

    def count(scheme, fused):
        return roofline.counted(shapes.SMALL, methods[scheme], TOKENS, fused=fused), shapes.SMALL

    return count


@pytest.mark.parametrize("scheme, fused", MOST)
def test_a_step_stays_as_lean_as_it_is(counted, scheme, fused):
    counter, shape = counted(scheme, fused)
    launches, bytes_a_weight = MOST[scheme, fused]
    total = counter.total
    assert total.launches <= launches and total.bytes / shape.weights <= bytes_a_weight
    assert total.launches > 0.9 * launches, "lower the limit to what it has become"
    assert total.bytes / shape.weights > 0.9 * bytes_a_weight, "lower the limit"
    assert counter.waits == 0


def test_operations_are_counted_by_hand(script):
    left, right = torch.empty(3, 4, device=META), torch.empty(4, 5, device=META)
    with script("gpu.counting").counting(META) as counter:
        torch.mm(left, right)
        left.view(4, 3)
        left.unsqueeze(0).expand(9, 3, 4).add(1)
    product, rest = counter.counts["products", "forward"], counter.counts["rest", "forward"]
    assert (product.launches, product.operations) == (1, 2 * 3 * 4 * 5)
    assert product.bytes == 4 * (3 * 4 + 4 * 5 + 3 * 5)
    assert (rest.launches, rest.bytes) == (1, 4 * (3 * 4 + 9 * 3 * 4))


def test_waits_are_seen(script):
    values = torch.ones(3, device=META)
    with script("gpu.counting").counting(META) as counter:
        values.add(1)
        assert counter.waits == 0
        values.sum().item()
        assert counter.waits == 1
        torch.ones(3).to(META)
        torch.tensor([1, 2], device=META)
    assert counter.waits == 3


def test_passes_and_freezing_do_not_wait_either(script):
    """All of it on one device, too: torch refuses tensors of the meta device beside a CPU's."""
    shapes, steps = script("gpu.shapes"), script("gpu.steps")
    bench = steps.bench_of(shapes.SMALL, steps.W4A4, META, torch.bfloat16, TOKENS)
    prepared = steps.prepare(bench, steps.W4A4, 1, TOKENS)
    with script("gpu.counting").counting(META) as counter:
        prepared.advance(prepared.statistics)
        prepared.view.freeze().tensors(torch.bfloat16)
    assert counter.waits == 0 and counter.total.launches > 100
    with pytest.raises(RuntimeError, match="device"):
        torch.empty(3, device=META) + torch.ones(3)
