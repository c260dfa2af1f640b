"""Rows of .jsonl, .json and .parquet files: how they lay documents out, and the documents in them.

A layout is known by its columns; a file of another one must name the column of its text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from lrquant.errors import LRQuantError
from lrquant.files.whole import JsonObject
from lrquant.model.sources.checks import first_line

Row = Mapping[str, object]
Message = JsonObject  # role, content as text, and what else a chat template reads
Document = str | tuple[Message, ...]  # text, or messages for a chat template

TEXT = "column text"
_SHARE = 0.25  # of the free memory that one text may take
_BATCH = 256  # rows of a parquet file that are unpacked at once
_CHATS = ("messages", "conversations", "conversation")
_QUESTIONS = ("instruction", "question", "query")
_ANSWERS = ("answer", "response", "output")
_COMPLETIONS = ("completion", "response", "answer", "output")
_SYSTEMS = ("system", "system_prompt")
_ROLES = {
    **{"human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant"},
    **{"bot": "assistant", "bard": "assistant", "bing": "assistant", "model": "assistant"},
    **{"observation": "tool", "function_response": "tool"},
}


@dataclass(frozen=True)
class Layout:
    """How a row holds a document: its `name` for people, and what reads it.

    `document` raises KeyError, TypeError or ValueError for a row of another layout.
    """

    name: str
    document: Callable[[Row], Document]


@dataclass(frozen=True)
class Documents:
    """All documents of a file, and the layout that its rows have."""

    items: Sequence[Document]
    layout: str


def read_rows(path: Path, content: str | None, column: str | None) -> Documents:
    """Documents of a file of rows; `content` is its text, None for parquet.

    Text is read of `column` alone if one is named, else as the first row's layout says.  Raises
    LRQuantError where a row has another layout, or where several columns could be meant.
    """
    rows = _parquet_rows(path) if content is None else _json_rows(path, content)
    return documents_of(rows, str(path), column)


def rows_of(items: Iterable[object], origin: str) -> Iterator[tuple[str, Row]]:
    """Rows as they are, a text or a conversation as a row of it alone, each with where it stands.

    Raises LRQuantError for an item that is none of them.
    """
    for number, item in enumerate(items, 1):
        if isinstance(item, Mapping):
            yield f"row {number}", item
        elif isinstance(item, str):
            yield f"text {number}", {"text": item}
        elif isinstance(item, list | tuple):
            yield f"conversation {number}", {"messages": list(item)}
        else:
            raise LRQuantError(
                f"{origin}: {type(item).__name__} in place {number}: expected texts, conversations "
                "(lists of messages) or rows, all of one kind"
            )


def documents_of(rows: Iterable[tuple[str, Row]], origin: str, column: str | None) -> Documents:
    """Documents of rows, each with where it stands in `origin`; as `read_rows` else."""
    layout: Layout | None = None
    documents: list[Document] = []
    for where, row in rows:
        layout = layout or _layout(origin, row, column)
        try:
            documents.append(_sound(layout.document(row)))
        except (KeyError, TypeError, ValueError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else first_line(error)
            raise LRQuantError(
                f"{origin}, {where}: not of the layout {layout.name!r}, which the first row has "
                f"({reason}); mend the row, or choose with --text-column"
            ) from error
    if layout is None:
        raise LRQuantError(f"{origin}: no rows in it")
    return Documents(documents, layout.name)


def _layout(origin: str, row: Row, column: str | None) -> Layout:
    """The layout that a first row has."""
    columns = ", ".join(map(str, row)) or "none"
    if column is not None:
        if column not in row:
            raise LRQuantError(f"{origin}: no column {column!r} (columns: {columns})")
        return Layout(f"column {column}", lambda row: _text_or_messages(row[column]))
    if "text" not in row:
        _refuse_pictures(origin, row)
    layout = _layout_by_columns(row)
    if layout is not None:
        return layout
    strings = [name for name, value in row.items() if isinstance(value, str)]
    if len(strings) == 1:
        (only,) = strings
        return Layout(f"column {only}", lambda row: _text(row[only]))
    if strings:
        raise LRQuantError(
            f"{origin}: any of the columns {', '.join(strings)} could be the text; name it with "
            "--text-column"
        )
    raise LRQuantError(f"{origin}: no column of strings (columns: {columns}): name the text `text`")


def _layout_by_columns(row: Row) -> Layout | None:
    """A layout that the columns tell, or None."""
    if isinstance(row.get("text", 0), str | None):
        return Layout(TEXT, lambda row: _text(row["text"]))
    chat = next((name for name in _CHATS if isinstance(row.get(name), list)), None)
    if chat is not None:
        return Layout(chat, lambda row: _messages(row[chat]))
    if {"chosen", "rejected"} <= row.keys():
        return Layout("preference: prompt and chosen", _preferred)
    question, answer = _first(row, _QUESTIONS), _first(row, _ANSWERS)
    if question and answer:
        return Layout(f"{question} and {answer}", lambda row: _exchange(row, question, answer))
    completion = _first(row, _COMPLETIONS)
    if "prompt" in row and completion:
        return Layout(f"prompt and {completion}", lambda row: _joined(row, "prompt", completion))
    return None


def _refuse_pictures(origin: str, row: Row) -> None:
    shown = _first(row, ("image", "images"))
    if shown is not None:
        raise LRQuantError(
            f"{origin}: its rows show pictures (column {shown}); give it to a multimodal model as "
            "--calib-images or --vqa, or choose a column of text with --text-column"
        )


def _first(row: Row, names: Iterable[str]) -> str | None:
    return next((name for name in names if name in row), None)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("a value that is no string")
    return value


def _text_or_messages(value: object) -> Document:
    return _messages(value) if isinstance(value, list) else _text(value)


def _messages(value: object) -> tuple[Message, ...]:
    """Messages as chat templates read them, from [{role, content}] or [{from, value}]."""
    if not isinstance(value, list) or not value:
        raise TypeError("a value that is no list of messages")
    return tuple(map(_message, value))


def _message(entry: object) -> Message:
    if not isinstance(entry, Mapping):
        raise TypeError("a message that is no object")
    if "role" not in entry and "from" in entry:
        role = str(entry["from"])
        return {"role": _ROLES.get(role, role), "content": _text(entry["value"])}
    message = {name: value for name, value in entry.items() if value is not None}
    content = entry["content"]
    if isinstance(content, list):
        content = "".join(_text_of(piece) for piece in content)
    return {**message, "role": _text(entry["role"]), "content": _text(content or "")}


def _text_of(piece: object) -> str:
    if not isinstance(piece, Mapping) or piece.get("type", "text") != "text":
        raise ValueError("a part that is no text; conversations with pictures go to --calib-images")
    return _text(piece["text"])


def _preferred(row: Row) -> Document:
    """The chosen answer after its prompt, if that is not in it already."""
    prompt, chosen = row.get("prompt"), row["chosen"]
    if isinstance(chosen, list):
        answer = _messages(chosen)
        if not prompt or answer[0]["role"] != "assistant":
            return answer
        before = _messages(prompt) if isinstance(prompt, list) else (_said("user", prompt),)
        return (*before, *answer)
    if isinstance(prompt, list):
        return (*_messages(prompt), _said("assistant", chosen))
    asked = "" if prompt is None else _text(prompt)
    said = _text(chosen)
    return said if said.startswith(asked) else asked + said


def _exchange(row: Row, question: str, answer: str) -> Document:
    """A question, with the `input` that Alpaca's rows have, and its answer."""
    asked = "\n\n".join(filter(None, [_text(row[question]), _text(row.get("input") or "")]))
    system = next((row[name] for name in _SYSTEMS if row.get(name)), None)
    before = () if system is None else (_said("system", system),)
    return *before, _said("user", asked), _said("assistant", row[answer])


def _joined(row: Row, prompt: str, completion: str) -> Document:
    """A prompt and what goes on with it: text, or messages where both are."""
    if isinstance(row[prompt], list) or isinstance(row[completion], list):
        before = row[prompt]
        first = _messages(before) if isinstance(before, list) else (_said("user", before),)
        after = row[completion]
        rest = _messages(after) if isinstance(after, list) else (_said("assistant", after),)
        return (*first, *rest)
    return _text(row[prompt]) + _text(row[completion])


def _said(role: str, words: object) -> Message:
    return {"role": role, "content": _text(words)}


def _sound(document: Document) -> Document:
    """The document, if it can be written as UTF-8: JSON may hold halves of characters."""
    for text in (document,) if isinstance(document, str) else (m["content"] for m in document):
        text.encode("utf-8")
    return document


def _json_rows(path: Path, content: str) -> Iterable[tuple[str, Row]]:
    """Rows of a file with one JSON object a line, or with one array of them."""
    if content.lstrip("\ufeff \t\r\n").startswith("["):
        values = _parsed(path, "file", content)
        assert isinstance(values, list)
        pairs = [(f"row {number}", value) for number, value in enumerate(values, 1)]
    else:
        pairs = [
            (f"line {number}", _parsed(path, f"line {number}", line))
            for number, line in enumerate(content.split("\n"), 1)
            if line.strip()
        ]
    for where, value in pairs:
        if not isinstance(value, dict):
            raise LRQuantError(f"{path}, {where}: not a JSON object, one a line is needed")
        yield where, value


def _parsed(path: Path, where: str, text: str) -> object:
    try:
        return json.loads(text.lstrip("\ufeff"))
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else first_line(error)
        raise LRQuantError(f"{path}, {where}: not JSON ({reason})") from error


def require_room(path: Path, size: int) -> None:
    """Refuse a text that would take most of the memory that is free."""
    free = psutil.virtual_memory().available
    if size > _SHARE * free:
        raise LRQuantError(
            f"{path}: {size / 1e9:.1f} GB of text, {free / 1e9:.1f} GB of memory are free; give a "
            "part of it"
        )


def _parquet_rows(path: Path) -> Iterable[tuple[str, Row]]:
    """Rows whose bytes and structures, pictures for example, are None: no text is made of them.

    A file may unpack to a thousand times its size: what it does unpack to is counted.
    """
    import pyarrow
    from pyarrow import parquet

    number, size = 0, 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            read = [entry.name for entry in file.schema_arrow if _is_readable(entry.type)]
            for batch in file.iter_batches(_BATCH, columns=read):
                size += batch.nbytes
                require_room(path, size)
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", dict.fromkeys(names) | row
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise LRQuantError(f"{path}: cannot be read as parquet ({first_line(error)})") from error


def _is_readable(kind: object) -> bool:
    from pyarrow import DataType, types

    assert isinstance(kind, DataType)
    unread = (types.is_binary, types.is_large_binary, types.is_struct, types.is_map)
    return not any(test(kind) for test in unread)
