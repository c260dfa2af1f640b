"""Questions about pictures as a model's inputs, its answers to them, and which are right."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel

from lrquant.data.conversations import Conversation, read_conversations
from lrquant.data.feeds import Feed, Inputs
from lrquant.data.prompts import Reader, prompt_inputs
from lrquant.data.vocabulary import require_known_tokens
from lrquant.errors import LRQuantError
from lrquant.measures.measure import WholeModel
from lrquant.measures.scoring.inputs import feed_of, joined, own_batches
from lrquant.measures.shares import counted
from lrquant.model.sources.checks import first_line
from lrquant.runs.progress import Progress
from lrquant.runs.results import Entry

ANSWER_TOKENS = 16  # most tokens of a generated answer
BATCH = 16  # prompts of the same shapes that are answered at once
PEOPLE = 3  # who must have given an answer for it to count in full
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NOT_WORDS = re.compile(r"(?!-\d)[^\w\s]")  # the sign of a number stays


class Questions:
    """Questions about pictures with right answers, as a model's inputs."""

    def __init__(self, path: Path, reader: Reader, limit: int = -1) -> None:
        items = read_conversations(path).items
        whole = len(items)
        items = items[:limit] if limit > 0 else items
        for item in items:
            if not item.answers or item.answered:
                raise LRQuantError(
                    f'{item.origin}: a question needs "answers", and no answer of the assistant '
                    "among its messages"
                )
        self.items: tuple[Conversation, ...] = items
        self.feed = Feed([prompt_inputs(reader, item) for item in items])
        require_known_tokens(self.feed, str(path), reader)
        tokens = sum(sample["input_ids"].shape[1] for sample in self.feed.inputs)
        of = f"the first {len(items)} of {whole}" if len(items) < whole else f"{whole}"
        self.description = f"{path.name}, {of} questions, {tokens} tokens"
        counts = counted(len(items), whole, "questions")
        answers = json.dumps([item.answers for item in items])
        sha256 = hashlib.sha256((self.feed.sha256() + answers).encode()).hexdigest()
        self.about: Entry = {"text": self.description, "sha256": sha256, "items": counts}


@torch.no_grad()
def answers(
    name: str, questions: Questions | None, model: WholeModel, progress: Progress
) -> list[str]:
    """What a model answers to each question, greedily generated.

    The first of a team has the questions, and each member its share of the batches.
    """
    module, team = model.module, model.team
    whole = team.first(partial(feed_of, questions))
    order = whole.grouped_order()
    feed = whole.only(order)
    tokenizer = model.reader.tokenizer
    assert tokenizer is not None
    words: dict[int, str] = {}
    with progress.measuring(f"{name} {model.variant}", len(feed), "questions") as told:
        for rows in own_batches(feed, BATCH, team):
            inputs = {key: value.to(module.device) for key, value in feed.collate(rows).items()}
            inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
            new = _generated(module, inputs)
            decoded = tokenizer.batch_decode(new, skip_special_tokens=True)
            words |= dict(zip(order[rows], decoded, strict=True))
            told(rows.stop - 1)
    every = joined(team, words)
    return [every[index] for index in range(len(feed))]


def _generated(module: PreTrainedModel, inputs: Inputs) -> Tensor:
    """The tokens (samples, tokens) that follow a batch of prompts."""
    try:
        output = _generator(module)(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    except ValueError as error:  # a way of generating that it names and nobody runs
        raise LRQuantError(
            f"--vqa: the model's generation_config.json asks for what transformers does "
            f"not do ({first_line(error)}); take it out"
        ) from error
    return output[:, inputs["input_ids"].shape[1] :]


def _generator(module: PreTrainedModel) -> Callable[..., Tensor]:
    """A model's `generate`; refuses a model that has none."""
    if not isinstance(module, GenerationMixin):
        raise LRQuantError(f"--vqa: a {type(module).__name__} generates no text")
    return getattr(module, "generate")  # noqa: B009


def normalized(answer: str) -> str:
    """Lower case, without punctuation and articles, single spaces: as the VQA evaluation does."""
    words = " ".join(_NOT_WORDS.sub(" ", answer.lower().replace("'", "")).split())
    return " ".join(_ARTICLES.sub(" ", words).split()) or words


def answer_kind(right: Sequence[str]) -> str:
    """What most of the right answers are, as VQA's own results are split: yes_no, number, other."""
    kinds = Counter(
        "yes_no" if answer in ("yes", "no") else "number" if answer.isdecimal() else "other"
        for answer in map(normalized, right)
    )
    return kinds.most_common(1)[0][0]


def exact_match(answer: str, right: Sequence[str]) -> float:
    """1 if the answer is one of the right ones."""
    return float(normalized(answer) in map(normalized, right))


def vqa_accuracy(answer: str, right: Sequence[str]) -> float:
    """``mean over the people of min(1, matches among the others / 3)`` (VQA, ICCV 2015).

    With at most 3 people, one match does.
    """
    matches = [normalized(answer) == normalized(other) for other in right]
    if len(right) <= PEOPLE:
        return float(any(matches))
    others = [sum(matches) - match for match in matches]
    return sum(min(1.0, count / PEOPLE) for count in others) / len(right)
