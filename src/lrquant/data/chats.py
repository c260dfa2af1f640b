"""Conversations of text, written out as the model's own chat template writes them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lrquant.data.rows import Document, Message
from lrquant.errors import LRQuantError
from lrquant.model.sources.checks import first_line

logger = logging.getLogger("lrquant")


@dataclass(frozen=True)
class WrittenOut:
    """Conversations as text; `way` says how, `special` whether their special tokens are in it."""

    documents: list[str]
    way: str
    special: bool


def written_out(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, origin: str
) -> WrittenOut | None:
    """All documents as text, None if none is a conversation.

    Without a chat template the messages of a conversation are joined by blank lines.  Raises
    LRQuantError for a conversation that the template refuses.
    """
    column = not isinstance(documents, list)  # on disk: text alone
    if column or not any(isinstance(each, tuple) for each in documents):
        return None
    if getattr(tokenizer, "chat_template", None) is None:
        texts = [each if isinstance(each, str) else _joined(each) for each in documents]
        return WrittenOut(texts, "no chat template: messages joined by blank lines", special=False)
    texts = [
        each if isinstance(each, str) else _templated(each, tokenizer, f"{origin}, row {number}")
        for number, each in enumerate(documents, 1)
    ]
    return WrittenOut(texts, "by the chat template", special=True)


def _joined(messages: Sequence[Message]) -> str:
    return "\n\n".join(message["content"] for message in messages)


def _templated(messages: tuple[Message, ...], tokenizer: PreTrainedTokenizerBase, at: str) -> str:
    """One conversation by the template; a system message that it refuses goes to the user's."""
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False))
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        folded = _without_system(messages)
        if folded is None:
            raise LRQuantError(
                f"{at}: the model's chat template does not take this conversation "
                f"({first_line(error)}); mend it or take it out"
            ) from error
    return _templated(folded, tokenizer, at)


def _without_system(messages: tuple[Message, ...]) -> tuple[Message, ...] | None:
    """The messages with a leading system message put before the first user's words."""
    if len(messages) < 2 or [m["role"] for m in messages[:2]] != ["system", "user"]:
        return None
    system, user, *rest = messages
    content = f"{system['content']}\n\n{user['content']}"
    return ({**user, "content": content}, *rest)
