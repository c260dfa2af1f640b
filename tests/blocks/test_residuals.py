"""Several residual streams of a token: in line between blocks, stacked where a block runs."""

from __future__ import annotations

import pytest
import torch

from lrquant.blocks.head import Head
from lrquant.blocks.inputs import BlockInputs
from lrquant.blocks.residuals import in_line, stacked
from lrquant.blocks.variants import full_precision
from lrquant.config.groups import Computing
from lrquant.data.feeds import Feed
from lrquant.data.samples import Samples
from lrquant.measures.scoring.predictions import send_through
from lrquant.measures.subjects.checkpoint import load_checkpoint


def test_one_is_the_reverse_of_the_other():
    states = torch.randn(4, 2, 3, 5, generator=torch.Generator().manual_seed(0))
    lined = in_line(states, 4)
    assert lined.shape == (2, 3, 20) and torch.equal(lined[1, 2, 5:10], states[1, 1, 2])
    assert torch.equal(stacked(lined, 4), states)
    assert stacked(lined, 1) is lined and in_line(lined, 1) is lined


def test_blocks_in_a_row_are_the_model(make_model, make_bench, token_ids):
    """And are not where two streams are exchanged in between."""
    module, ids = make_model("gemma3n"), token_ids(3, 12)
    expected, distances = module(ids).logits, []
    for order in ((0, 1, 2, 3), (0, 2, 1, 3)):
        bench = make_bench(module)
        entry = BlockInputs(bench.model, ids, 2, bench.device)
        (stream,) = bench.streams(entry, 1)
        assert stream.states.shape == (36, 128)

        def exchange(_: int, stream=stream, order=order) -> None:
            stream.states.copy_(stream.states.unflatten(1, (4, -1))[:, order].flatten(1))

        send_through(bench.model, full_precision(bench), stream, entry, exchange)
        head = Head(bench.model, bench.device, bench.dtype)
        found = torch.cat([head(stream.read(batch)) for batch in entry.batches])
        distances.append(float((found - expected).abs().max()))
    assert distances[0] < 1e-4 and distances[1] > 1e-2


@pytest.mark.parametrize("form", ["dequantized", "lrquant"])
def test_a_checkpoints_last_states_are_those_that_its_head_takes(
    form, saved, tiny_tokenizer, token_ids
):
    scheme, ids = "W4A4" if form == "lrquant" else "W4A16", token_ids(2, 12)
    folder = saved("gemma3n", scheme, format=form, tokenizer=tiny_tokenizer)
    checkpoint = load_checkpoint(str(folder), Computing("cpu", "float32", "auto"))
    feed = Feed.of_tokens(ids)
    samples = Samples(torch.empty((0, 0), dtype=torch.int64), "", "", "", "", feed)
    states = checkpoint.final_states(samples).states.view(2, 12, -1)
    torch.testing.assert_close(checkpoint.head(states), checkpoint.module(ids).logits)
