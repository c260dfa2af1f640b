"""easy-VQA as conversations: pictures with train.jsonl and test.jsonl in transformers' chat format.

    pip install --no-deps easy-vqa==1.0      # MIT, 4,000 + 1,000 pictures of 64 x 64 pixels
    python examples/easy_vqa_data.py --out easy_vqa_data --max-train 512

A line of train.jsonl holds "messages": the picture and the question of a user and the assistant's
answer, for calibration.  A line of test.jsonl has no assistant turn, but "answers".  Picture paths
are relative to the folder.  All 38,575 + 9,673 questions are written unless a --max says otherwise;
a smaller number is drawn from all questions with --seed.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = "easy-vqa==1.0"
SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")


@dataclass(frozen=True)
class Question:
    """One question about one picture, with its only right answer."""

    picture: int
    text: str
    answer: str

    @property
    def kind(self) -> str:
        """What is asked for: shape, color, or yes/no."""
        if self.answer in ("yes", "no"):
            return "yes/no"
        return "shape" if self.answer in SHAPES else "color"

    @property
    def negated(self) -> bool:
        return bool({"not", "no"} & set(self.text.split()))

    @property
    def of_color(self) -> bool:
        """Whether it names a color."""
        return bool(set(COLORS) & set(self.text.split()))

    def true_words(self) -> set[str]:
        """Shape and color words that hold for the picture, as far as the question tells."""
        named = set(self.text.rstrip("?").split()) & {*SHAPES, *COLORS}
        holds = self.kind != "yes/no" or self.negated == (self.answer == "no")
        return (named if holds else set()) | ({self.answer} - {"yes", "no"})


def load_split(split: str) -> tuple[list[Question], dict[int, Path]]:
    """All questions of "train" or "test" in the package's order, and each picture's file."""
    try:
        import easy_vqa
    except ImportError as error:
        raise SystemExit(f"pip install --no-deps {PACKAGE}") from error
    texts, answers, pictures = getattr(easy_vqa, f"get_{split}_questions")()
    questions = [Question(*fields) for fields in zip(pictures, texts, answers, strict=True)]
    files = getattr(easy_vqa, f"get_{split}_image_paths")()
    return questions, {picture: Path(file) for picture, file in files.items()}


def conversation(question: Question, picture_path: str, answered: bool) -> dict[str, Any]:
    """The question as a line of train.jsonl (answered) or of test.jsonl."""
    asked = [{"type": "image", "path": picture_path}, {"type": "text", "text": question.text}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": asked}]
    if not answered:
        return {"messages": messages, "answers": [question.answer]}
    said = [{"type": "text", "text": question.answer}]
    return {"messages": [*messages, {"role": "assistant", "content": said}]}


def export(split: str, folder: Path, limit: int | None, seed: int) -> int:
    """Write folder/split.jsonl with the pictures it names; returns the number of questions."""
    questions, files = load_split(split)
    if limit is not None and limit < len(questions):
        questions = random.Random(seed).sample(questions, limit)
    (folder / "images" / split).mkdir(parents=True, exist_ok=True)
    lines = []
    for question in questions:
        path = f"images/{split}/{question.picture}.png"
        if not (folder / path).exists():
            shutil.copyfile(files[question.picture], folder / path)
        lines.append(json.dumps(conversation(question, path, answered=split == "train")))
    (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--max-train", type=int, help="most questions in train.jsonl (default all)")
    parser.add_argument("--max-test", type=int, help="most questions in test.jsonl (default all)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    for split, limit in (("train", options.max_train), ("test", options.max_test)):
        count = export(split, options.out, limit, options.seed)
        print(f"{options.out / split}.jsonl: {count} questions")


if __name__ == "__main__":
    main()
