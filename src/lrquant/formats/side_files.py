"""Files beside a checkpoint's tensors: tokenizer, processor, chat template, generation.

They are copied from the source folder byte for byte, as every library re-writes them its own way.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from lrquant.errors import LRQuantError
from lrquant.files.manifest import COPIED, matches
from lrquant.files.whole import JsonObject, read_json
from lrquant.model.model import Model

logger = logging.getLogger("lrquant")
_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
_REFUSED = (".py", ".pkl", ".pickle", ".pt", ".pth", ".bin", ".safetensors", ".gguf", ".msgpack")
_WRITTEN = ("config.json", "README.md", "*.safetensors*", "*.bin*", ".*")  # anew, or never
_LOCAL_KEYS = ("cache_dir", "_name_or_path")
_FAST = "PreTrainedTokenizerFast"  # a plain tokenizer.json, for transformers 4 and 5
_BACKEND = "TokenizersBackend"  # the same, as version 5 writes it and 4 does not know
_TOKENIZER_CONFIG = "tokenizer_config.json"


def copy_side_files(model: Model, place: Path) -> None:
    """Write all that belongs to a model beside its configuration and its tensors."""
    if model.folder is None:
        _generate(model, place)
        return
    names = _side_files(model, model.folder)
    for name in names:
        target = place / name
        target.parent.mkdir(exist_ok=True)
        _copy(model.folder / name, target)
    _spell_out_pictures(place)
    left = [n for n in sorted(_names(model.folder)) if n not in names and not matches(n, _WRITTEN)]
    if left:
        logger.info("left out of the checkpoint: %s", ", ".join(left))


def _side_files(model: Model, folder: Path) -> list[str]:
    """Names of the files to copy, relative to the source folder."""
    declared = [
        name
        for owner in (model.tokenizer, getattr(model.processor, "tokenizer", None))
        for name in (getattr(owner, "vocab_files_names", None) or {}).values()
        if isinstance(name, str) and Path(name).name == name
    ]
    wanted = (*COPIED, *_LICENCES, *declared)
    return [n for n in _names(folder) if matches(n, wanted) and not n.endswith(_REFUSED)]


def _names(folder: Path) -> Iterator[str]:
    """Files of a folder, and its chat templates'."""
    for pattern in ("*", "additional_chat_templates/*.jinja"):
        for path in sorted(folder.glob(pattern)):
            if path.is_file():
                yield path.relative_to(folder).as_posix()


def _copy(source: Path, target: Path) -> None:
    """The same bytes, unless a file names code, a place on this machine, or what only 5 knows."""
    if source.name.endswith("config.json"):
        values = _json(source)
        cleaned = without_local_keys(values) if isinstance(values, dict) else values
        if isinstance(cleaned, dict) and cleaned.get("tokenizer_class") == _BACKEND:
            cleaned = _plain(cleaned)
        if cleaned != values:
            _write_json(target, cleaned)
            return
    shutil.copyfile(source, target)


def _json(path: Path) -> object:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise LRQuantError(f"{path}: not JSON; get it again") from error


def without_local_keys(values: JsonObject) -> JsonObject:
    """A JSON object without custom code (`auto_map`), caches, and paths of the machine they are of.

    Only the keys of objects are looked at, of which lists hold none.
    """
    return {
        key: without_local_keys(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if key != "auto_map" and not _is_local(key, value)
    }


def _is_local(key: str, value: object) -> bool:
    if key in _LOCAL_KEYS:
        return True
    named = key.endswith(("name_or_path", "_file", "_dir"))
    return named and isinstance(value, str) and value.startswith(("/", "~", ".", "\\"))


def _write_json(path: Path, values: object) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _generate(model: Model, place: Path) -> None:
    """For a model without a folder: files that transformers 4 and 5 read alike."""
    for owner in (model.processor, model.tokenizer):
        if owner is not None:
            owner.save_pretrained(place)
    if model.generation is not None:
        model.generation.save_pretrained(place)
    for path in place.glob("*config.json"):
        if path.name == "config.json":
            continue
        values = without_local_keys(read_json(path))
        if path.name == _TOKENIZER_CONFIG and (place / "tokenizer.json").is_file():
            values = _plain(values)
        _write_json(path, values)
    _spell_out_pictures(place)


def _spell_out_pictures(place: Path) -> None:
    """What makes pictures into inputs, in the file where version 4 looks for it, if 5 nested it."""
    nested, own = place / "processor_config.json", place / "preprocessor_config.json"
    if own.is_file() or not nested.is_file():
        return
    values = read_json(nested).get("image_processor")
    if isinstance(values, dict):
        _write_json(own, values)


def _plain(values: JsonObject) -> JsonObject:
    """A tokenizer's settings under which both versions read tokenizer.json as it is."""
    unknown = ("backend", "is_local", "local_files_only")
    kept = {key: value for key, value in values.items() if key not in unknown}
    extra = kept.pop("extra_special_tokens", None)
    if isinstance(extra, list):  # a dictionary for version 4
        kept["additional_special_tokens"] = extra
    elif extra is not None:
        kept["extra_special_tokens"] = extra
    return {**kept, "tokenizer_class": _FAST}
