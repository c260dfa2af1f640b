"""Text that a model writes: the answer to a conversation, or what goes on with a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from lrquant.errors import LRQuantError

HOTTEST = 100


@dataclass(frozen=True)
class Drawing:
    """How tokens are drawn: `temperature` 0 draws none, None as the model's settings say."""

    max_tokens: int = 256
    temperature: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise LRQuantError(f"max_tokens {self.max_tokens}: use a whole number of at least 1")
        if self.temperature is not None and not 0 <= self.temperature <= HOTTEST:
            raise LRQuantError(f"temperature {self.temperature}: use 0 to {HOTTEST}")

    @property
    def arguments(self) -> dict[str, bool | float]:
        """What `generate` is told, where that is not as the model's settings say."""
        if self.temperature is None:
            return {}
        if not self.temperature:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature}


def require_writer(
    module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, name: str
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model that writes text; LRQuantError for another."""
    if not module.can_generate():
        raise LRQuantError(f"{name}: no model that writes text")
    if tokenizer is None:
        raise LRQuantError(f"{name}: no tokenizer, so it writes no text; give it one")
    return tokenizer


def answer(
    module: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[Mapping[str, str]],
    drawing: Drawing,
    streamer: BaseStreamer | None = None,
) -> str:
    """The next turn of a conversation; without a chat template the text goes on."""
    text, templated = "\n".join(turn["content"] for turn in turns), bool(tokenizer.chat_template)
    if templated:
        messages = [dict(turn) for turn in turns]
        text = str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )
    encoded = tokenizer(text, return_tensors="pt", add_special_tokens=not templated)
    ids = encoded["input_ids"].to(module.device)
    with torch.random.fork_rng([module.device] if module.device.type == "cuda" else []):
        torch.manual_seed(drawing.seed)
        written = module.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=drawing.max_tokens,
            streamer=streamer,
            **drawing.arguments,
        )
    return str(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))
