"""A checkpoint on the hub: what is asked before a run, and the upload of what was written."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from lrquant.config.settings import read_yaml
from lrquant.errors import LRQuantError
from lrquant.files.manifest import MANIFEST, SETTINGS
from lrquant.files.publishing import HASHES, read_hashes
from lrquant.model.sources.hub import offline

CARD = "README.md"
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_OF_THE_HUB = {".gitattributes"}
_PLACES = ("/", "~", "./", "../")  # how a place on a machine begins
_FAILURES = (HfHubHTTPError, LocalTokenNotFoundError, HFValidationError, HTTPError, OSError)


def require_repository(name: str, overwrite: bool) -> str:
    """The whole name of the repository to push to; refuses one that cannot or must not be written.

    That is one that has files and is no checkpoint of lrquant, or is one without `overwrite`.
    """
    api = HfApi()
    try:
        validate_repo_id(name)
        owner = api.whoami()["name"]
        whole = name if "/" in name else f"{owner}/{name}"
        files = set(_files(api, whole)) - _OF_THE_HUB
    except _FAILURES as error:
        raise _refused(name, error) from error
    if files and MANIFEST not in files:
        raise LRQuantError(
            f"--push-to-hub {whole}: holds something else than a checkpoint of lrquant; use "
            "another name"
        )
    if files and not overwrite:
        raise LRQuantError(
            f"--push-to-hub {whole}: holds a checkpoint; replace it with --overwrite, or use "
            "another name"
        )
    return whole


def push(place: Path, name: str, card: str, overwrite: bool) -> str:
    """Upload the checkpoint in `place` in one commit; returns the page's address.

    A new repository is private.  The settings go without places on this machine, the card is `card`
    and the list of hashes is of those; weights of an older checkpoint that are no more are removed.
    """
    whole, api = require_repository(name, overwrite), HfApi()
    texts = _texts(place, card)
    paths = {
        path.relative_to(place).as_posix(): path for path in place.rglob("*") if path.is_file()
    }
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(file, texts.get(file, path)) for file, path in sorted(paths.items())
    ]
    try:
        address = api.create_repo(whole, private=True, exist_ok=True)
        stale = [file for file in _files(api, whole) if _is_weights(file) and file not in paths]
        operations += [CommitOperationDelete(file) for file in stale]
        api.create_commit(whole, operations, commit_message="Checkpoint by lrquant")
    except _FAILURES as error:
        raise LRQuantError(
            f"--push-to-hub {whole}: {_reason(error)}; the checkpoint is whole in {place}: `hf "
            f"upload {whole} {place}` sends it as it is there"
        ) from error
    return str(address)


def _files(api: HfApi, name: str) -> list[str]:
    """What a repository holds; nothing where there is none."""
    return list(api.list_repo_files(name)) if api.repo_exists(name) else []


def _is_weights(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in _WEIGHTS)


def _texts(place: Path, card: str) -> dict[str, bytes]:
    """Small files as they go to the hub, where those differ from the ones in the folder."""
    texts = {CARD: card.encode()}
    if (place / SETTINGS).is_file():
        values = {key: _without_place(value) for key, value in read_yaml(place / SETTINGS).items()}
        texts[SETTINGS] = yaml.safe_dump(values, sort_keys=False, allow_unicode=True).encode()
    return texts | {HASHES: "".join(_hash_lines(place, texts)).encode()}


def _hash_lines(place: Path, texts: dict[str, bytes]) -> Iterator[str]:
    """Lines as `sha256sum` reads them, of every other file."""
    for name, digest in read_hashes(place).items():
        text = texts.get(name)
        yield f"{digest if text is None else hashlib.sha256(text).hexdigest()}  {name}\n"


def _without_place(value: object) -> object:
    """A setting's value whose places on a machine are named by their last part."""
    if isinstance(value, list):
        return [_without_place(each) for each in value]
    if isinstance(value, str) and value.startswith(_PLACES):
        return Path(value).name
    return value


def _refused(name: str, error: Exception) -> LRQuantError:
    return LRQuantError(f"--push-to-hub {name}: {_reason(error)}")


def _reason(error: Exception) -> str:
    """What the hub, or the way to it, said, with what mends it."""
    away = "offline (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else offline(error)
    if away is not None:
        return f"{away.partition(',')[0]}; push when there is a network, or leave it out"
    if isinstance(error, HFValidationError):
        return "no name of a repository; give OWNER/NAME"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, LocalTokenNotFoundError) or status in (401, 403):
        return "not logged in, or not allowed to write there; log in with `hf auth login`"
    return f"the hub refused it ({str(error).splitlines()[0]})"
