"""The count of what learning a block takes, beside what it must at least keep."""

from __future__ import annotations

COUNTED = """
import block_memory
from gpu.shapes import SMALL
from gpu.steps import Method

block_memory.pretended()
for rounding, tokens in ((False, 64), (True, 64), (True, 256)):
    print(*block_memory.counted(SMALL, Method("W4A16g128", rounding=rounding), tokens))
"""


def test_rounding_takes_an_offset_its_gradient_its_start_and_its_best(printed):
    (stored, start, plain), (_, _, rounded), (_, _, longer) = printed(COUNTED)
    weights = 147_456
    assert stored == 2 * (weights + 2 * 128)
    assert stored < start < plain < longer and rounded < longer
    assert 14 * weights < rounded - plain < 18 * weights
