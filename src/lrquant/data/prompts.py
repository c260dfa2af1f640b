"""Conversations with pictures as a model's inputs, by its own processor and chat template."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

import torch
from jinja2 import TemplateError
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrquant.architectures import Architecture
from lrquant.data.conversations import (
    Conversation,
    Conversations,
    open_picture,
    picture_files,
    read_conversations,
)
from lrquant.data.feeds import Feed, Inputs, has_pictures
from lrquant.data.samples import Samples
from lrquant.data.texts import file_source
from lrquant.errors import LRQuantError
from lrquant.model.reading import Processor
from lrquant.model.sources.checks import first_line

Item = TypeVar("Item")


class Reader(Protocol):
    """What a model's inputs are made with: its processor, and what says how it reads."""

    @property
    def name(self) -> str: ...

    @property
    def processor(self) -> Processor | None: ...

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None: ...

    @property
    def skeleton(self) -> PreTrainedModel: ...

    @property
    def architecture(self) -> Architecture: ...


@runtime_checkable
class Templated(Protocol):
    """What writes conversations out by a chat template, if it has one."""

    chat_template: object

    def apply_chat_template(
        self, conversation: Sequence[Mapping[str, object]], **settings: object
    ) -> object: ...


def takes_pictures(model: Reader) -> bool:
    """Whether pictures are among what a model reads."""
    return model.architecture.tower is not None or model.architecture.reads_pixels


def require_processor(model: Reader) -> Processor:
    """A model's processor; refuses a model that has none or takes no pictures."""
    if not takes_pictures(model):
        raise LRQuantError(
            f"model {model.name}: a {model.skeleton.config.model_type!r} takes no pictures; leave "
            "the option that names some out"
        )
    if model.processor is None:
        raise LRQuantError(
            f"model {model.name}: no processor for pictures can be read from it; copy "
            "preprocessor_config.json and processor_config.json from the model's origin, with the "
            "packages pillow and torchvision installed"
        )
    return model.processor


def prompt_inputs(model: Reader, conversation: Conversation) -> Inputs:
    """What the model's own processor and chat template make of a conversation, on the CPU."""
    processor = require_processor(model)
    pictures = [open_picture(path) for path in conversation.pictures]
    try:
        output = processor_inputs(processor, conversation, pictures)
    except (ValueError, TypeError, KeyError, IndexError, TemplateError) as error:
        raise LRQuantError(
            f"{conversation.origin}: the processor of model {model.name} does not take it with "
            f"{len(pictures)} picture{'' if len(pictures) == 1 else 's'} ({first_line(error)})"
        ) from error
    arguments = set(inspect.signature(type(model.skeleton).forward).parameters)
    arguments -= {"labels"}  # what a training processor adds
    inputs = {n: v for n, v in output.items() if isinstance(v, Tensor) and n in arguments}
    if pictures and not has_pictures(inputs):
        raise LRQuantError(
            f"{conversation.origin}: the chat template of model {model.name} has no place for its "
            "picture; use the processor and template of the multimodal model"
        )
    if "attention_mask" in inputs and bool(inputs["attention_mask"].all()):
        del inputs["attention_mask"]  # nothing is padded
    return inputs


def processor_inputs(
    processor: Callable[..., Mapping[str, object]],
    conversation: Conversation,
    pictures: Sequence[Image.Image],
) -> Mapping[str, object]:
    """A processor's output; without a chat template, pictures stand before the plain words."""
    if not isinstance(processor, Templated) or processor.chat_template is None:
        words = [
            piece["text"]
            for message in conversation.messages
            for piece in message["content"]
            if piece["type"] == "text"
        ]
        mark = getattr(processor, "image_token", "<image>")
        text = mark * len(pictures) + "\n".join(words)
        return processor(images=list(pictures), text=text, return_tensors="pt")
    left = iter(pictures)
    messages = [
        {
            "role": message["role"],
            "content": [
                {"type": "image", "image": next(left)} if piece["type"] == "image" else piece
                for piece in message["content"]
            ],
        }
        for message in conversation.messages
    ]
    output = processor.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=not conversation.answered,
    )
    assert isinstance(output, Mapping)
    return output


def picture_samples(
    path: Path, model: Reader, count: int = -1, seed: int = 0, picture_weight: float = 1.0
) -> Samples:
    """Conversations as a model's inputs: `count` drawn by `seed`, all of them if it is negative.

    Each token of a picture counts `picture_weight` times as much as one of text in losses and
    statistics; distributions are compared where the next token is text.
    """
    require_processor(model)
    if model.architecture.reads_pixels:
        return _classifier_samples(path, model, count, seed)
    conversations = read_conversations(path)
    items = _drawn(conversations.items, count, seed)
    inputs = [prompt_inputs(model, item) for item in items]
    masks = [picture_tokens(model, sample["input_ids"][0]) for sample in inputs]
    weights = [
        None if picture_weight == 1 else torch.where(mask, picture_weight, 1.0) for mask in masks
    ]
    tokens, pictures = sum(map(len, masks)), sum(int(mask.sum()) for mask in masks)
    words = f"{tokens} tokens, {pictures} of them of pictures"
    feed = Feed(inputs, weights, [~mask for mask in masks])
    return _samples(path, feed, conversations, len(items), words, seed)


def _classifier_samples(path: Path, model: Reader, count: int, seed: int) -> Samples:
    """Pictures below a folder as pixel values."""
    if not path.is_dir():
        raise LRQuantError(f"{path}: not a folder; a classifier is calibrated on pictures alone")
    files, skipped = picture_files(path)
    chosen = _drawn(files, count, seed)
    inputs = [pixel_inputs(model, file) for file in chosen]
    items = tuple(Conversation((), (file,), str(file)) for file in files)
    conversations = Conversations(items, tuple(skipped))
    return _samples(path, Feed(inputs), conversations, len(chosen), "pictures alone", seed)


def pixel_inputs(model: Reader, file: Path) -> Inputs:
    """A classifier's inputs for one picture."""
    output = require_processor(model)(images=open_picture(file), return_tensors="pt")
    return {"pixel_values": output["pixel_values"]}


def _samples(
    path: Path, feed: Feed, whole: Conversations, chosen: int, words: str, seed: int
) -> Samples:
    total = len(whole.items)
    of = f"{chosen} of {total}" if chosen < total else f"{total}"
    alone = sum(not has_pictures(sample) for sample in feed.inputs)
    words = f"{alone} of them without, {words}" if alone else words
    left_out = f", {len(whole.skipped)} could not be opened" if whole.skipped else ""
    drawn = f", seed {seed}" if chosen < total else ""
    description = f"{path.name} ({of} with pictures{left_out}), {words}{drawn}"
    empty = torch.empty((0, 0), dtype=torch.int64)
    texts = frozenset({file_source(path)})
    return Samples(empty, str(path), "pictures", feed.sha256(), description, feed, total, texts)


def _drawn(items: Sequence[Item], count: int, seed: int) -> list[Item]:
    if count < 0 or count >= len(items):
        return list(items)
    return random.Random(seed).sample(list(items), count)


def picture_tokens(model: Reader, ids: Tensor) -> Tensor:
    """Which of the tokens (tokens,) stand for pictures, bool."""
    config = model.skeleton.config
    marks = [
        getattr(config, name, None)
        for name in ("image_token_id", "image_token_index", "video_token_id")
    ]
    shown = torch.zeros_like(ids, dtype=torch.bool)
    for mark in marks:
        if mark is not None:
            shown |= ids == mark
    return shown


def mixed(pictures: Samples, text: Samples, seed: int) -> Samples:
    """Samples with pictures and samples of text alone, in an order that `seed` decides."""
    feed = pictures.feed + text.feed
    order = list(range(len(feed)))
    random.Random(seed).shuffle(order)
    feed = feed.only(order)
    return Samples(
        pictures.ids,
        f"{pictures.name},{text.name}",
        f"{pictures.split},{text.split}",
        feed.sha256(),
        f"{pictures.description}; and {text.description}",
        feed,
        texts=pictures.texts | text.texts,
    )
