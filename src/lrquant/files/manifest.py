"""lrquant.json: what a checkpoint is, where it comes from, and the hash of each of its files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path

from lrquant.errors import LRQuantError
from lrquant.files.publishing import HASHES, read_hashes
from lrquant.files.whole import JsonObject, is_regular, read_json, sha256_of
from lrquant.version import __version__

MANIFEST = "lrquant.json"
SETTINGS = "lrquant.yaml"
VERSION = 1


def write_manifest(place: Path, facts: Mapping[str, object]) -> None:
    """Add the facts and the SHA-256 of each file, the run's settings and the model card apart.

    Those two name places and dates, may be edited, and are not read when the model is loaded.
    """
    files = {
        name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(place.rglob("*"))
        for name in [path.relative_to(place).as_posix()]
        if path.is_file() and name not in (SETTINGS, MANIFEST, "README.md")
    }
    values = {"version": VERSION, "lrquant": __version__, **facts, "files": files}
    (place / MANIFEST).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> JsonObject:
    """A checkpoint's manifest; LRQuantError if it is of a newer version, or not one at all."""
    values = read_json(folder / MANIFEST)
    version = values.get("version")
    if not isinstance(version, int) or not _is_list_of_files(values.get("files")):
        raise LRQuantError(f"{folder / MANIFEST}: not a manifest; export the run again")
    if version > VERSION:
        raise LRQuantError(
            f"{folder}: a checkpoint of version {version}: this lrquant reads up to {VERSION}; "
            "update lrquant"
        )
    return values


def changed_files(folder: Path, manifest: JsonObject) -> list[str]:
    """What differs from the manifest, and whether that is as it was written, a sentence a file."""
    problems = []
    own = read_hashes(folder).get(MANIFEST) if is_regular(folder / HASHES) else None
    if own is not None and sha256_of(folder / MANIFEST) != own:
        problems.append(f"{MANIFEST}: changed since it was written (SHA-256 differs)")
    for name, promised in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name}: missing")
        elif path.stat().st_size != promised["bytes"]:
            size = path.stat().st_size
            problems.append(f"{name}: {size} bytes, {promised['bytes']} were written")
        elif sha256_of(path) != promised["sha256"]:
            problems.append(f"{name}: changed since it was written (SHA-256 differs)")
    names = sorted(path.name for path in folder.iterdir() if path.name not in manifest["files"])
    added = [name for name in names if is_read_by_others(name)]
    return problems + [
        f"{name}: not of this checkpoint, but readers would take it" for name in added
    ]


def require_whole(folder: Path) -> None:
    """LRQuantError unless the files of a checkpoint are those that were written, and no others."""
    problems = changed_files(folder, read_manifest(folder))
    if problems:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise LRQuantError(f"checkpoint {folder}: {problems[0]}{more}; export the run again")


def _is_list_of_files(files: object) -> bool:
    """Whether it is hashes by relative paths inside the folder."""
    return isinstance(files, dict) and all(
        not {"", "..", "."} & set(name.split("/"))
        and isinstance(promised, dict)
        and isinstance(promised.get("bytes"), int)
        and isinstance(promised.get("sha256"), str)
        for name, promised in files.items()
    )


COPIED = (
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab*.json"),
    *("merges.txt", "vocab.txt", "*.tiktoken", "*.spm", "tokenizer*.model*", "tekken.json"),
    *("spiece.model", "sentencepiece*.model", "normalizer.json", "bpe.codes", "*.bpe"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    *("*preprocessor_config.json", "processor_config.json", "image_processor_config.json"),
    "generation_config.json",
)


def is_read_by_others(name: str) -> bool:
    """Whether a reader of a checkpoint would look at a file of this name."""
    weights = name.endswith((".safetensors", ".bin", ".index.json", ".py"))
    return weights or name == "adapter_config.json" or matches(name, COPIED)


def matches(name: str, patterns: Iterable[str]) -> bool:
    return any(
        fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns
    )
