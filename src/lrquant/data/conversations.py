"""Pictures with words around them, read from a folder or a .jsonl.

A line of a .jsonl is ``{"messages": […]}`` in the chat format of transformers, or ``{"image": …,
"question": …}``; either may have ``"answers": […]``.  Pictures are named relative to the file.
"""

from __future__ import annotations

import json
import logging
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

from PIL import Image, ImageOps

from lrquant.errors import LRQuantError
from lrquant.files.whole import JsonObject

logger = logging.getLogger("lrquant")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_UNREADABLE = (
    *(OSError, ValueError, SyntaxError, EOFError, struct.error),
    Image.DecompressionBombError,
)
_START = 1 << 20  # bytes of a file that tell whether it holds conversations
QUESTION = "Describe this picture."


class Content(TypedDict):
    """A piece of a message: a picture, without its name, or text."""

    type: str
    text: NotRequired[str]


class PictureMessage(TypedDict):
    """A message in the chat format of transformers, which may show pictures."""

    role: str
    content: list[Content]


@dataclass(frozen=True)
class Conversation:
    """Messages in the chat format of transformers, their pictures by path, and right answers."""

    messages: tuple[PictureMessage, ...]
    pictures: tuple[Path, ...]
    origin: str
    answers: tuple[str, ...] = ()

    @property
    def answered(self) -> bool:
        """Whether it ends with the assistant's own words."""
        return self.messages[-1]["role"] == "assistant"


@dataclass(frozen=True)
class Conversations:
    """What a folder or file holds; `skipped` says of each picture left out why."""

    items: tuple[Conversation, ...]
    skipped: tuple[str, ...]


def read_conversations(path: Path) -> Conversations:
    """Conversations of a .jsonl; or of a folder of pictures, one about each that can be opened.

    Raises LRQuantError where a line is no conversation or its picture can't be opened.
    """
    if path.is_dir():
        return _of_folder(path)
    if path.exists() and not path.is_file():
        raise LRQuantError(f"{path}: a pipe or device; give a folder of pictures or a .jsonl")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise LRQuantError(
            f"{path}: cannot be read ({error}); give a folder of pictures or a .jsonl of "
            "conversations"
        ) from error
    items = [
        _conversation(line, f"{path}, line {number}", path.parent)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not items:
        raise LRQuantError(f"{path}: no conversation in it")
    return Conversations(tuple(items), ())


def picture_files(folder: Path) -> tuple[list[Path], list[str]]:
    """Pictures below a folder, by name, and why others with a picture's suffix were left out."""
    pictures, skipped = [], []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in SUFFIXES or not (path.is_file() or path.is_symlink()):
            continue
        try:
            open_picture(path)
            pictures.append(path)
        except LRQuantError as error:
            skipped.append(str(error))
            logger.warning("picture left out: %s", error)
    if not pictures:
        beside = f"; {len(skipped)} could not be opened (first: {skipped[0]})" if skipped else ""
        raise LRQuantError(f"{folder}: no pictures ({', '.join(SUFFIXES)}){beside}")
    return pictures, skipped


def open_picture(path: Path) -> Image.Image:
    """A picture in RGB, decoded to its end."""
    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except FileNotFoundError as error:
        raise LRQuantError(f"picture {path}: no such file") from error
    except _UNREADABLE as error:
        raise LRQuantError(
            f"picture {path}: cannot be opened ({error}); replace it or take it out"
        ) from error


def _of_folder(folder: Path) -> Conversations:
    files, skipped = picture_files(folder)
    items = [Conversation((_about_a_picture(QUESTION),), (file,), str(file)) for file in files]
    return Conversations(tuple(items), tuple(skipped))


def _about_a_picture(words: str) -> PictureMessage:
    return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": words}]}


def _conversation(line: str, origin: str, folder: Path) -> Conversation:
    wanted = f'{origin}: expected {{"messages": […]}} or {{"image": …, "question": …}}'
    try:
        values = json.loads(line)
        answers = _answers(values.get("answers", values.get("answer", [])))
        if "messages" not in values:
            messages = [_about_a_picture(values["question"])]
            named = [values["image"]]
        else:
            messages, named = _split(values["messages"])
        pictures = tuple(folder / name for name in named)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise LRQuantError(f"{wanted} ({type(error).__name__}: {error})") from error
    if not messages:
        raise LRQuantError(f"{wanted}, got no message")
    for path in pictures:
        if not path.is_file():
            raise LRQuantError(f"{origin}: its picture {path} does not exist; add it")
    return Conversation(tuple(messages), pictures, origin, answers)


def _answers(value: object) -> tuple[str, ...]:
    """Right answers: one, a list of them, or a list of {"answer": …} as VQA's own files have."""
    entries = value if isinstance(value, list) else [value]
    answers = [entry["answer"] if isinstance(entry, dict) else entry for entry in entries]
    if not all(isinstance(answer, str | int | float) for answer in answers):
        raise ValueError(f"answers {value!r} are neither words nor numbers")
    return tuple(map(str, answers))


def _split(messages: list[JsonObject]) -> tuple[list[PictureMessage], list[str]]:
    """Messages without their pictures' names, and the names in order."""
    names: list[str] = []
    cleaned: list[PictureMessage] = []
    for message in messages:
        content = message["content"]
        pieces = [{"type": "text", "text": content}] if isinstance(content, str) else content
        kept: list[Content] = []
        for piece in pieces:
            if piece["type"] == "image":
                named = [piece[key] for key in ("path", "image", "url") if key in piece]
                if not named:
                    raise ValueError('an image needs a "path"')
                names.append(str(named[0]))
                kept.append({"type": "image"})
            elif piece["type"] == "text":
                kept.append({"type": "text", "text": piece["text"]})
            else:
                raise ValueError(f"a part of type {piece['type']!r}: use image or text")
        cleaned.append({"role": message["role"], "content": kept})
    return cleaned, names


def is_conversations(path: Path) -> bool:
    """Whether a file's first line is a conversation, not a line of text alone."""
    if path.suffix != ".jsonl" or not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(_START).lstrip()  # a line may be endless
    first = start.split(b"\n", 1)[0]
    return b'"messages"' in first or b'"image"' in first
