"""Keys and values that blocks leave for later ones: each batch of each stream has its own."""

from __future__ import annotations

import pytest
import torch

from lrquant.blocks.handed import HandedOn, leaves, moved, owe_
from lrquant.blocks.head import Head
from lrquant.blocks.inputs import BlockInputs
from lrquant.blocks.variants import full_precision
from lrquant.measures.scoring.predictions import send_through


@pytest.fixture
def change(make_model, make_bench, token_ids):
    """change(spoil) -> largest change of logits, of three batches, against the whole model.

    `spoil` is given the stream before each block but the first.
    """
    module, ids = make_model("gemma4"), token_ids(3, 12)

    def of(spoil=lambda stream: None) -> float:
        bench = make_bench(module)
        entry = BlockInputs(bench.model, ids, 1, bench.device)
        (stream,) = bench.streams(entry, 1)
        send_through(bench.model, full_precision(bench), stream, entry, lambda _: spoil(stream))
        head = Head(bench.model, bench.device, bench.dtype)
        found = torch.cat([head(stream.read(batch)) for batch in entry.batches])
        return float((found - module(ids).logits).abs().max())

    return of


def test_each_batch_reads_its_own(change):
    assert change() < 1e-4

    def mix_up(stream):
        first, *others = list(stream.handed)
        for other in others:
            stream.handed[other] = stream.handed[first]

    assert change(mix_up) > 1e-2


def test_without_them_a_block_does_not_run(change):
    with pytest.raises(KeyError, match="attention"):
        change(lambda stream: stream.handed.clear())


def test_what_a_batch_does_not_share_is_kept_once_and_the_rest_for_all(make_model, make_bench):
    """Inputs of a block by token differ between batches; masks and rotations do not."""
    bench = make_bench(make_model("gemma4"))
    ids = torch.arange(3, 39).view(3, 12)
    entry = BlockInputs(bench.model, ids, 1, bench.device)
    (stream,) = bench.streams(entry, 1)
    entry.embed(stream)
    one, other = (entry.arguments(batch, 1) for batch in (0, 1))
    assert one["position_embeddings"] is other["position_embeddings"]
    assert not torch.equal(one["per_layer_input"], other["per_layer_input"])


def test_new_states_are_told_from_those_that_were_read():
    states = HandedOn({"a": (torch.ones(2),)})
    states["b"] = (torch.zeros(2),)
    assert set(states.new) == {"b"}
    states["a"] = (torch.ones(2),)
    assert set(states.new) == {"a", "b"}


def test_gradients_of_all_that_read_are_summed():
    states, owed = {"a": (torch.ones(2), torch.ones(2))}, {}
    for factor in (2.0, 3.0):
        read = leaves(moved(states, torch.device("cpu"), torch.float32))
        (factor * (read["a"][0] + 2 * read["a"][1]).sum()).backward()
        owe_(owed, read)
    assert [each.tolist() for each in owed["a"]] == [[5.0, 5.0], [10.0, 10.0]]
