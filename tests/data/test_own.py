"""Calibration data of who calls: texts, messages, rows, token ids, and what a loader gives."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding

from lrquant.config.groups import Calibrating, Sources
from lrquant.data.feeds import Feed
from lrquant.data.own import own_data, own_samples
from lrquant.errors import LRQuantError
from lrquant.model.loading import from_module

TEXTS = [f"text number {number} of several" for number in range(6)]
ASKED = Calibrating("wikitext2", 4, 2, None, 0.5, 1.0)
SOURCES = Sources(None, None, None, "auto", 16, -1)
CHAT = [{"role": "user", "content": "how are you?"}, {"role": "assistant", "content": "very well"}]


@pytest.fixture(scope="module")
def samples(make_model, tiny_tokenizer):
    """The samples that a model learns on of such data."""
    model = from_module(make_model("llama"), tiny_tokenizer)
    return lambda value, most=4: own_samples(own_data(value, most), ASKED, SOURCES, model)


@pytest.mark.parametrize(
    "value",
    [
        TEXTS,
        tuple(TEXTS),
        (text for text in TEXTS),
        Dataset.from_dict({"text": TEXTS}),
        Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(),
        [{"text": text} for text in TEXTS],
        DataLoader(TEXTS, batch_size=None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_texts_are_drawn_from_alike(samples, value):
    drawn = samples(value)
    assert drawn.ids.shape == (4, 16) and drawn.sha256 == samples(TEXTS).sha256
    assert "given (6 documents)" in drawn.description and "seed 2" in drawn.description


def test_conversations_are_written_out(samples):
    alone, rows = samples(CHAT), samples(Dataset.from_dict({"messages": [CHAT, CHAT]}))
    assert samples([CHAT, CHAT]).sha256 == rows.sha256
    assert alone.ids.shape == (4, 16) and "messages joined by blank lines" in alone.description


@pytest.mark.parametrize(
    "value",
    [
        [[5, 6, 7], [8, 9, 10]],
        [torch.tensor([5, 6, 7]), torch.tensor([[8, 9, 10]])],
        [torch.tensor([[5, 6, 7], [8, 9, 10]], dtype=torch.int32)],
        DataLoader(TensorDataset(torch.tensor([[5, 6, 7], [8, 9, 10]])), batch_size=2),
        Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 9, 10]]}),
        [BatchEncoding({"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]])})],
        [
            {
                "input_ids": torch.tensor([[0, 5, 6, 7], [0, 8, 9, 10]]),
                "attention_mask": torch.tensor([[0, 1, 1, 1]] * 2),
                "labels": torch.zeros(2),
            }
        ],
    ],
    ids=lambda value: type(value).__name__,
)
def test_tokens_are_taken_as_they_are(samples, value):
    assert samples(value).ids.tolist() == [[5, 6, 7], [8, 9, 10]]


def test_samples_of_several_lengths_and_with_pictures(samples):
    feed = samples([[5, 6, 7], [8, 9]]).feed
    assert [sample["input_ids"].shape[1] for sample in feed.inputs] == [3, 2]
    batch = {"input_ids": torch.tensor([[5, 6]]), "pixel_values": torch.ones(1, 3, 2, 2)}
    (sample,) = own_data([{**batch, "labels": torch.zeros(1, 2)}], 4).feed.inputs
    assert sample.keys() == batch.keys()
    assert own_data(Feed([batch]), 4).feed.inputs == [batch]


def test_of_a_loader_the_first_samples_are_taken(samples):
    def endless():
        while True:
            yield torch.tensor([[5, 6], [7, 8], [9, 10]])

    assert samples(endless()).ids.tolist() == [[5, 6], [7, 8], [9, 10], [5, 6]]
    assert len(samples([[5, 6]] * 9).ids) == 9, "a list is taken whole"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([], "calibration of type list: nothing in it"),
        (3, "calibration of type int: expected texts"),
        ({"text": TEXTS}, "calibration of type dict: expected texts"),
        ([3.5], "float in place 1"),
        ([TEXTS[0], None], "NoneType in place 2"),
        ([TEXTS[0], CHAT], "conversation 2: not of the layout"),
        ([{"pixels": 1, "question": 2}], "calibration: no column of strings"),
        ([torch.ones(3)], "expected whole numbers"),
        ([[5, 6], []], "expected whole numbers"),
        ([{"input_ids": [[5, 6], [7]]}], "of one length a batch"),
        ([{"input_ids": [5]}, {"x": 1}], "a batch of x has no input_ids"),
        ([{"input_ids": [5], "attention_mask": [0]}], "all masked"),
        ([{"input_ids": [[5], [6]], "pixel_values": torch.ones(2, 3)}], "give batches of one"),
        (["short"], "fewer than one window"),
    ],
    ids=str,
)
def test_data_that_can_not_be_taken(samples, value, said):
    with pytest.raises(LRQuantError, match=said):
        samples(value)
