"""Finding a model: a local folder, a GGUF file, or a download from the hub."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from lrquant.errors import LRQuantError, nearest_beside
from lrquant.model.sources.hub import offline
from lrquant.model.sources.kinds import kind_without_config

_HUB_FILES = [
    *("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"),
    *("README.md", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"),
]
_HUB_IGNORED = ["*/*", "consolidated*"]  # other software's copies of the same weights


@dataclass(frozen=True)
class ModelFiles:
    """Where a model's files are; `gguf_file` is relative to `folder`."""

    kind: Literal["local", "hub", "gguf"]
    folder: Path
    gguf_file: str | None = None


def resolve_model(name: str, cache_dir: Path | None) -> ModelFiles:
    """Find a local folder, a GGUF file (or a folder of one) or a hub model, downloading the last.

    With HF_HUB_OFFLINE=1 a hub model comes from the cache alone.
    """
    path = Path(os.path.expanduser(name))
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise LRQuantError(f"model {name}: a file, but not .gguf; give its folder instead")
        return ModelFiles("gguf", path.parent, path.name)
    if not path.is_dir():
        _require_hub_name(name, path)
        return ModelFiles("hub", _download(name, cache_dir))
    if (path / "config.json").is_file():
        return ModelFiles("local", path)
    names = sorted(file.name for file in path.glob("*.gguf"))
    kind = kind_without_config(path)
    if not names and kind is not None:
        raise LRQuantError(f"model {name}: {kind}")
    if len(names) != 1:
        what = f"{len(names)} GGUF files" if names else "no GGUF file"
        advice = "give the path of one of them" if names else "give a Hugging Face model folder"
        raise LRQuantError(f"model {name}: this folder holds no config.json and {what}; {advice}")
    return ModelFiles("gguf", path, names[0])


def _require_hub_name(name: str, path: Path) -> None:
    """Refuse what can only mean a place on this machine, and is not there."""
    parts = name.split("/")
    if parts[0] in ("", ".", "..", "~") or len(parts) > 2 or name.lower().endswith(".gguf"):
        kind = "file" if name.lower().endswith(".gguf") else "folder"
        raise LRQuantError(f"model {name}: no such {kind}{nearest_beside(path)}")


def _download(name: str, cache_dir: Path | None) -> Path:
    try:
        validate_repo_id(name)
        folder = Path(
            snapshot_download(
                name,
                cache_dir=cache_dir,
                allow_patterns=_HUB_FILES,
                ignore_patterns=_HUB_IGNORED,
            )
        )
        if not any(folder.glob("*.safetensors")):
            patterns = ["pytorch_model*.bin"]
            snapshot_download(
                name, cache_dir=cache_dir, allow_patterns=patterns, ignore_patterns=_HUB_IGNORED
            )
    except (OSError, ValueError, RuntimeError, HTTPError) as error:
        advice = "check the spelling and the connection, or give the folder of a downloaded model"
        if isinstance(error, GatedRepoError):
            advice = "accept its licence on the hub, then log in with `hf auth login`"
        elif isinstance(error, RepositoryNotFoundError):
            advice = "the hub has no such repository, or it is private: check the spelling"
        reason = offline(error)
        raise LRQuantError(
            f"model {name}: neither a local path nor reachable or cached on the hub "
            f"({reason or type(error).__name__}){nearest_beside(Path(name))}; {advice}"
        ) from error
    if not (folder / "config.json").is_file():
        kind = kind_without_config(folder)
        if kind is not None:
            raise LRQuantError(f"model {name}: {kind}")
        raise LRQuantError(
            f"model {name}: its hub repository holds no config.json; name the repository of the "
            "original model, or download one .gguf file and give its path"
        )
    return folder
