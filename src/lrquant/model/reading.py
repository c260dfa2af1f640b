"""Reading a model's folder with transformers: in one line if it can't, never with its code.

A folder may name classes of its own (`auto_map`), to be run from Python files that lie in it.  They
are neither run nor asked about: where transformers has no class for the model, it is refused.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.image_processing_utils import BaseImageProcessor

from lrquant.errors import UNREADABLE, LRQuantError
from lrquant.files.whole import JsonObject, json_or_empty
from lrquant.model.sources.checks import AGAIN, first_line, sound_file
from lrquant.model.sources.gguf_header import require_sound_header

FAILURES = (  # what transformers, the hub and what they call raise for files that are not right
    *(*UNREADABLE, ImportError, StrictDataclassError, SafetensorError, TemplateError),
)
_NAMING = (
    *("config.json", "tokenizer_config.json", "processor_config.json"),
    *("preprocessor_config.json", "video_preprocessor_config.json"),
)

_MOST_LABELS = 10**6

Processor = ProcessorMixin | BaseImageProcessor  # of a multimodal model, of an image classifier


@contextmanager
def reading(what: str, folder: Path, mend: str = AGAIN) -> Iterator[None]:
    """Around a call of a library: its errors become one line; `mend` says what would help."""
    try:
        with _nobody_to_ask():
            yield
    except FAILURES as error:
        raise _unreadable(what, folder, mend, error) from error
    except LRQuantError:
        raise
    except Exception as error:
        if type(error) is not Exception:
            raise
        # tokenizers, written in Rust, has no other class for a file that it can't parse
        raise _unreadable(what, folder, mend, error) from error


@contextmanager
def _nobody_to_ask() -> Iterator[None]:
    """Standard input is at its end: transformers asks there whether to run a folder's code.

    Not all of its classes hand on that they may not.
    """
    answers, sys.stdin = sys.stdin, io.StringIO()
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        sys.stdin = answers


def _unreadable(what: str, folder: Path, mend: str, error: Exception) -> LRQuantError:
    if "trust_remote_code" in str(error):
        return LRQuantError(
            f"{folder}: {what} could only be read by running code of its own "
            f"({own_code(folder) or 'auto_map'}), which is never done; use a model for which "
            "transformers has a class itself"
        )
    if isinstance(error, PermissionError):
        return LRQuantError(f"{error.filename or folder}: may not be read by this user; mend that")
    if isinstance(error, ImportError):
        said = first_line(error).partition(". ")[0]
        return LRQuantError(f"{folder}: {what} cannot be read here ({said}); install that")
    return LRQuantError(f"{folder}: {what} cannot be read ({first_line(error)}); {mend}")


def own_code(folder: Path) -> str:
    """The classes that a folder's files name as their own, for people."""
    names: list[str] = []
    for path in (folder / name for name in _NAMING):
        own = json_or_empty(path).get("auto_map")
        for entry in own.values() if isinstance(own, dict) else ():
            classes = entry if isinstance(entry, list) else [entry]
            names += [f"{each} of {path.name}" for each in classes if isinstance(each, str)]
    return ", ".join(dict.fromkeys(names))


def read_config(folder: Path, gguf_file: str | None = None) -> PreTrainedConfig:
    """A model's configuration, its attention torch's: what it names might be code on the hub."""
    extra = {"gguf_file": gguf_file} if gguf_file else {}
    if gguf_file:
        require_sound_header(sound_file(folder / gguf_file))
    with reading("its configuration", folder):
        if not gguf_file:
            _require_few_labels(json.loads((folder / "config.json").read_bytes()))
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            folder, trust_remote_code=False, **extra
        )
        config._attn_implementation = "sdpa"
        return config


def _require_few_labels(values: JsonObject) -> None:
    """Refuse what would be spelled out as a list without end."""
    for each in (values, *(nested for nested in values.values() if isinstance(nested, dict))):
        labels = each.get("num_labels")
        if isinstance(labels, int | float) and not labels <= _MOST_LABELS:
            raise ValueError(f"num_labels above {_MOST_LABELS}")


def read_tokenizer(folder: Path, gguf_file: str | None = None) -> PreTrainedTokenizerBase:
    """A model's tokenizer."""
    extra = {"gguf_file": gguf_file} if gguf_file else {}
    with reading("its tokenizer", folder):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **extra)


def read_processor(
    folder: Path, loader: type[AutoProcessor] | type[AutoImageProcessor]
) -> Processor:
    """A model's processor of pictures, by an auto class."""
    with reading("its processor of pictures", folder):
        processor: Processor = loader.from_pretrained(folder, trust_remote_code=False)
        return processor


def read_generation(folder: Path) -> GenerationConfig | None:
    """How a model generates where it says so apart from its configuration."""
    if not (folder / "generation_config.json").is_file():
        return None
    with reading("generation_config.json", folder):
        return GenerationConfig.from_pretrained(folder)
