"""Under which name and licence a model was published, as far as its files tell."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from lrquant.errors import UNREADABLE

_CACHED = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/")  # as the hub's cache names folders
_URL = re.compile(r"https://huggingface\.co/([^/\s]+/[^/\s]+)/?$")
_FRONT = re.compile(r"\A---\s*\n(.*?)\n---\s*(\n|\Z)", re.DOTALL)
_TOLD = ("license", "license_name", "license_link", "language")
_IN_GGUF = {
    "license": "general.license",
    "license_name": "general.license.name",
    "license_link": "general.license.link",
}


@dataclass(frozen=True)
class Publication:
    """`repository` is the hub's name of a model, empty where none is known; `told` is what its card
    says of licence and languages, by the card's own keys."""

    repository: str = ""
    told: Mapping[str, object] = field(default_factory=dict)


def publication_of(name: str, folder: Path | None) -> Publication:
    """That of a model by the name that was given, and the folder of its files if it has one."""
    path = Path(os.path.expanduser(name))
    if path.is_dir() and folder is None:
        path = next(iter(sorted(path.glob("*.gguf"))), path)
    if path.is_file():
        return _of_gguf(path)
    told = {} if folder is None else _of_card(folder / "README.md")
    if not path.exists() and _is_repository(name):
        return Publication(name, told)
    cached = _CACHED.search(f"{(folder or path).absolute().as_posix()}/")
    return Publication("/".join(cached.groups()) if cached else "", told)


def _is_repository(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def _of_card(path: Path) -> dict[str, object]:
    """Licence and languages in the front matter of a model card; nothing of what is none."""
    try:
        front = _FRONT.match(path.read_text(encoding="utf-8"))
        values = yaml.safe_load(front[1]) if front else None
    except (*UNREADABLE, yaml.YAMLError):
        return {}
    if not isinstance(values, dict):
        return {}
    return {key: values[key] for key in _TOLD if isinstance(values.get(key), str | list)}


def _of_gguf(path: Path) -> Publication:
    """What a GGUF file says of the model that it was made from."""
    try:
        fields = gguf.GGUFReader(path).fields
        said = {key: fields[name].contents() for key, name in _IN_GGUF.items() if name in fields}
        base = fields.get("general.base_model.0.repo_url")
        url = _URL.match(str(base.contents())) if base is not None else None
    except UNREADABLE:
        return Publication()
    return Publication(url[1] if url else "", {k: v for k, v in said.items() if isinstance(v, str)})
