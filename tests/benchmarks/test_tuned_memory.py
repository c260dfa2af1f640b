"""The count of what tuning takes: on the device no more for more blocks that live on the host."""

from __future__ import annotations

import pytest

COUNTED = """
from dataclasses import replace
import tuned_memory
from gpu.shapes import SMALL

tuned_memory.pretended()
tuning = tuned_memory.METHODS["codes too"]
for offload in ("host", "device"):
    for blocks in (2, 4):
        shape = replace(SMALL, blocks=blocks)
        most = tuned_memory.allocated(shape, tuning, 3, 64, offload, 256)
        print(most[tuned_memory.BACKEND], most["cpu"])
"""


def test_blocks_on_the_host_are_on_the_device_one_at_a_time(printed):
    (few, few_on_host), (more, more_on_host), (near, near_on_host), (all_near, _) = printed(COUNTED)
    block, states = 147_456 * 3.2 + 1152 * 28, 3 * 64 * 128 * 4
    assert few <= more < few + 0.1 * block < near < all_near  # each block has arguments of its own
    assert (more_on_host - few_on_host) / (2 * (block + states)) == pytest.approx(1, rel=0.05)
    assert (all_near - near) / (2 * (block + states)) == pytest.approx(1, rel=0.1)
    assert near_on_host < block
