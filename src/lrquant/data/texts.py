"""Reading texts: named sets from a folder or the hub, and local files."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lrquant.data.declared import text_sources
from lrquant.data.rows import Document, documents_of, read_rows, require_room, rows_of
from lrquant.errors import LRQuantError, nearest, nearest_beside
from lrquant.model.sources.hub import offline

SPLITS = ("train", "validation", "test")
FILE_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Convention:
    """How the field reads a named set: `base` is its folder and hub set, streams are joined."""

    base: str
    perplexity_split: str
    joint: str
    stream: bool


@dataclass(frozen=True)
class HubSet:
    """Where the hub keeps a set: data files by split (None: as the repository names its splits).

    `needs` is a package outside the requirements; `documents` caps how many are read.
    """

    repository: str
    column: str = "text"
    configuration: str | None = None
    files: dict[str, str] | None = None
    revision: str | None = None
    documents: int | None = None
    needs: str | None = None


CONVENTIONS = {
    "wikitext2": Convention("wikitext2", "test", "\n\n", stream=True),
    "c4": Convention("c4", "validation", "\n\n", stream=False),
    "c4-new": Convention("c4", "validation", " ", stream=False),
    "ptb": Convention("ptb", "validation", "\n\n", stream=True),
    "ptb-new": Convention("ptb", "test", " ", stream=True),
    "pile": Convention("pile", "validation", "\n\n", stream=True),
}
HUB = {
    "wikitext2": HubSet("Salesforce/wikitext", configuration="wikitext-2-raw-v1"),
    "c4": HubSet(
        "allenai/c4",
        files={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
    ),
    # A script repository, which datasets >= 4 cannot run: the hub's own parquet copy of it.
    "ptb": HubSet(
        "ptb-text-only/ptb_text_only",
        column="sentence",
        files={split: f"penn_treebank/{split}/*.parquet" for split in SPLITS},
        revision="refs/convert/parquet",
    ),
    "pile": HubSet(
        "mit-han-lab/pile-val-backup",
        files={"validation": "val.jsonl.zst"},
        documents=1000,
        needs="zstandard",
    ),
}


TextSplit = tuple[str, str]  # where a text comes from, and which split of it


@dataclass(frozen=True)
class Text:
    """One split of one set; `origin` is a file path or a hub id, `split` of a file is "file".

    `layout` says which columns the documents of a file of rows are made of.
    """

    name: str
    split: str
    documents: Sequence[Document]
    origin: str
    layout: str = ""

    @property
    def source(self) -> TextSplit:
        """What it is, by whichever name or path it was asked for."""
        path = Path(self.origin)
        return file_source(path) if path.is_file() else (self.origin, self.split)

    def label(self, *notes: str) -> str:
        """What the text is called for people, with notes about it."""
        name = self.name if self.split == "file" else f"{self.name}/{self.split}"
        said = "; ".join(note for note in notes if note)
        return f"{name} ({said})" if said else name

    def missing_split(self, preferred: str, data_dir: Path | None) -> str:
        """A note that it is not of the split that is `preferred`, empty if it is."""
        if self.split in (preferred, "file"):
            return ""
        local = data_dir is not None and data_dir in Path(self.origin).parents
        place = f" in {data_dir}" if local else " on the hub" if self.name in CONVENTIONS else ""
        return f"no {preferred} split{place}"


def file_source(path: Path) -> TextSplit:
    """What a local file, or a folder of pictures, is."""
    return str(path.resolve()), "file"


def load_text(
    name: str,
    splits: Sequence[str],
    data_dir: Path | None,
    cache_dir: Path | None,
    column: str | None = None,
) -> Text:
    """Read the first of `splits` that `name` has: a file, or a set of whoever has it.

    A set with a folder in `data_dir` is read from there only, others from the hub or of the package
    that declares them.  `column` is that of the text in a file of rows.
    """
    require_known(name, data_dir)
    if is_file_name(name):
        return _file_text(name, column)
    base = _base(name)
    present = _local_splits(base, data_dir)
    if present:
        return _local_text(name, base, splits, present)
    if name in CONVENTIONS:
        return _hub_text(name, base, splits, data_dir, cache_dir)
    return _declared_text(name, splits, column)


def require_known(name: str, data_dir: Path | None) -> None:
    """Refuse a name that is no file, nor a set of a folder, the hub or a package."""
    if is_file_name(name):
        _require_file(Path(name).expanduser())
        return
    if data_dir is not None and not data_dir.is_dir():
        raise LRQuantError(f"data_dir {data_dir}: no such folder")
    if not (_local_splits(_base(name), data_dir) or name in CONVENTIONS or name in text_sources()):
        near = nearest(name, [*CONVENTIONS, "mix", "self", *text_sources(), *_local_sets(data_dir)])
        raise LRQuantError(f"unknown data set {name!r}{near}: {_names_to_choose_from(data_dir)}")


def _base(name: str) -> str:
    return CONVENTIONS[name].base if name in CONVENTIONS else name


def is_file_name(name: str) -> bool:
    """Whether a data set's name is a path to a local file."""
    return Path(name).suffix.lower() in FILE_SUFFIXES


def _names_to_choose_from(data_dir: Path | None) -> str:
    names = ", ".join([*CONVENTIONS, *text_sources()])
    named = f"known are {names}, and for calibration mix, self and comma lists"
    local = "a folder of data_dir with train.txt, validation.txt or test.txt"
    if data_dir is not None:
        local += f" ({data_dir} has: {', '.join(_local_sets(data_dir)) or 'none'})"
    return f"{named}; {local}; a path ending in {', '.join(FILE_SUFFIXES)}"


def _local_sets(data_dir: Path | None) -> list[str]:
    """The sets that a folder of one's own has."""
    folders = [] if data_dir is None else data_dir.iterdir()
    return sorted(each.name for each in folders if _local_splits(each.name, data_dir))


def _local_splits(base: str, data_dir: Path | None) -> dict[str, Path]:
    if data_dir is None or not base or Path(base).name != base:
        return {}
    paths = {split: data_dir / base / f"{split}.txt" for split in SPLITS}
    return {split: path for split, path in paths.items() if path.is_file()}


def _local_text(name: str, base: str, splits: Sequence[str], present: dict[str, Path]) -> Text:
    for split in splits:
        if split in present:
            content = _read_text(present[split])
            # No PTB sentence holds a blank line, so the joined file splits into them again.
            documents = content.split("\n\n") if base == "ptb" else [content]
            return Text(name, split, documents, str(present[split]))
    folder = next(iter(present.values())).parent
    wanted = " or ".join(f"{split}.txt" for split in splits)
    raise LRQuantError(
        f"{name}: {folder} has {', '.join(path.name for path in present.values())}, "
        f"but {wanted} is needed here: add it"
    )


def _declared_text(name: str, splits: Sequence[str], column: str | None) -> Text:
    origin = f"text {name}"
    for split in splits:
        items = list(text_sources()[name].documents(split))
        if items:
            rows = documents_of(rows_of(items, origin), origin, column)
            return Text(name, split, rows.items, origin, rows.layout)
    raise LRQuantError(f"{origin}: has no {' or '.join(splits)} split; name another set")


def _hub_text(
    name: str, base: str, splits: Sequence[str], data_dir: Path | None, cache_dir: Path | None
) -> Text:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import EntryNotFoundError, HTTPError

    failures = (OSError, ValueError, ImportError, DatasetsError, EntryNotFoundError, HTTPError)
    hub = HUB[base]
    split = next((split for split in splits if split in (hub.files or SPLITS)), splits[0])
    try:
        dataset = load_dataset(
            hub.repository,
            hub.configuration,
            data_files={split: hub.files[split]} if hub.files else None,
            revision=hub.revision,
            split=split,
            cache_dir=None if cache_dir is None else str(cache_dir),
        )
        column = dataset[hub.column]  # stays on disk; a ValueError if it is not there
    except failures as error:
        raise _unavailable(name, base, split, data_dir, error) from error
    documents = column if hub.documents is None else column[: hub.documents]
    return Text(name, split, documents, hub.repository)


def _unavailable(
    name: str, base: str, split: str, data_dir: Path | None, error: Exception
) -> LRQuantError:
    hub = HUB[base]
    cause = offline(error) or " ".join(f"{type(error).__name__}: {error}".split())[:200]
    local = "no data_dir is given" if data_dir is None else f"not in {data_dir}"
    network = "a network"
    if hub.needs and importlib.util.find_spec(hub.needs) is None:
        network += f" and `pip install {hub.needs}`"
    return LRQuantError(
        f"{name}: {local}, and the hub's {hub.repository} cannot be read ({cause}): "
        f"give --data_dir DIR with DIR/{base}/{split}.txt, or {network}"
    )


def _file_text(name: str, column: str | None) -> Text:
    path = Path(name).expanduser()
    suffix = path.suffix.lower()
    content = None if suffix == ".parquet" else _read_text(path)
    if suffix == ".txt" and content is not None:
        return Text(name, "file", [content], str(path))
    rows = read_rows(path, content, column)
    return Text(name, "file", rows.items, str(path), rows.layout)


def _require_file(path: Path) -> None:
    """Refuse what would be waited for, read for ever, or take most of the memory."""
    if not path.exists() and not path.is_symlink():
        raise LRQuantError(f"{path}: no such file{nearest_beside(path)}")
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "a pipe or device"
        raise LRQuantError(f"{path}: {kind}, not a file of text")
    if path.is_file():
        require_room(path, path.stat().st_size)


def _read_text(path: Path) -> str:
    try:
        # As newline='': line ends stay as they are; a byte-order mark is no text.
        text = path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise LRQuantError(f"{path}: not UTF-8 at byte {error.start}: convert it") from error
    except OSError as error:
        raise LRQuantError(f"{path}: cannot be read ({error.strerror})") from error
    if "\0" in text:
        raise LRQuantError(
            f"{path}: has NUL characters, as binary and UTF-16 files do: convert it to UTF-8 text"
        )
    return text
