"""Kinds of folders that are no model in floating point, told before a weight is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from lrquant.errors import LRQuantError
from lrquant.files.whole import json_or_empty
from lrquant.model.sources.checks import is_listed

ADAPTER = "adapter_config.json"
_OWN = ("lrquant.json", "lrquant.yaml")
_QUANTIZERS = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
_QUANTIZED_KEYS = ("quantization_config", "compression_config", "quantization")
_UNPACKED = "mxfp4"  # weights that are read as what they stand for, see mxfp4.py
_ORIGINAL = "give its folder in the form of transformers (config.json and *.safetensors)"
_WITHOUT_CONFIG = (  # a file's pattern, what its folder is, and what to do
    ("run.json", "a run folder", "evaluate or export it, or give the model that it is of"),
    ("params.json", "a model in the layout of its makers (params.json)", _ORIGINAL),
    ("consolidated*", "a model in the layout of its makers (consolidated)", _ORIGINAL),
    ("model_index.json", "a pipeline of diffusers, not a language model", "give a language model"),
    ("*.onnx", "an ONNX model", _ORIGINAL),
    ("*.nemo", "a NeMo model", _ORIGINAL),
    ("*.distcp", "a sharded training checkpoint", "save the whole model with save_pretrained"),
    ("global_step*", "a DeepSpeed checkpoint", "make it whole with its zero_to_fp32.py"),
    ("checkpoint-*", "a folder of training checkpoints", "give one of the folders in it"),
    ("snapshots", "a folder of the hub's cache", "give the hub name, or a folder in snapshots"),
)
_OTHER_WEIGHTS = (  # weights that stand beside a config.json and are not read
    ("consolidated*", "weights in the layout of its makers (consolidated)", _ORIGINAL),
    ("*.onnx", "ONNX weights", "get the safetensors of the same model"),
    ("onnx/*.onnx", "ONNX weights", "get the safetensors of the same model"),
    ("tf_model*.h5", "TensorFlow weights", "get the safetensors of the same model"),
    ("flax_model*.msgpack", "Flax weights", "get the safetensors of the same model"),
    ("openvino_model*", "OpenVINO weights", "get the safetensors of the same model"),
    ("*.distcp", "a sharded training checkpoint", "save the model with save_pretrained"),
    ("pytorch_model_fsdp*", "a sharded training checkpoint", "save the model with save_pretrained"),
    ("global_step*", "a DeepSpeed checkpoint", "make it whole with its zero_to_fp32.py"),
    ("*.gguf", "a GGUF file", "give the path of that file"),
)
_TOKENIZERS = (
    *("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt"),
    *("vocab.json", "tekken.json", "vocab.bpe"),
)


def kind_without_config(folder: Path) -> str | None:
    """What a folder that has no config.json is and what to do about it, or None."""
    if (folder / ADAPTER).is_file():
        return _adapter(folder)
    return _first_match(folder, _WITHOUT_CONFIG)


def kind_of_weights(folder: Path) -> str | None:
    """What weights a folder holds beside its config.json where there are none to be read."""
    return _first_match(folder, _OTHER_WEIGHTS)


def require_floating_point(name: str, folder: Path) -> None:
    """Refuse a folder whose files say that its weights went through a quantiser, or are not all.

    That is a checkpoint of this project in any format, one of another tool, or an adapter.
    """
    if (folder / ADAPTER).is_file():
        raise LRQuantError(f"model {name}: {_adapter(folder)}")
    own = next((file for file in _OWN if (folder / file).is_file()), None)
    if own is not None:
        raise LRQuantError(
            f"model {name}: already quantised, by this project ({own}), in whatever format; "
            f"{_origin(folder)}"
        )
    for file in _QUANTIZERS:
        if (folder / file).is_file():
            raise LRQuantError(
                f"model {name}: already quantised ({file}); start from the floating-point model"
            )
    config = json_or_empty(folder / "config.json")
    where = None if is_unpacked(config) else quantized_by(config)
    if where is not None:
        raise LRQuantError(
            f"model {name}: already quantised ({where}); start from the floating-point model"
        )


def is_unpacked(config: Mapping[str, object]) -> bool:
    """Whether the quantised weights that a configuration tells of are unpacked while read."""
    value = config.get("quantization_config")
    return isinstance(value, Mapping) and value.get("quant_method") == _UNPACKED


def quantized_by(config: Mapping[str, object]) -> str | None:
    """Where a configuration, or that of a part of it, says that the weights are quantised."""
    for key in _QUANTIZED_KEYS:
        if config.get(key):
            value = config[key]
            method = value.get("quant_method") if isinstance(value, Mapping) else None
            return f"{key} of {method}" if method else key
    for section, values in config.items():
        if section.endswith("_config") and isinstance(values, Mapping):
            within = next((key for key in _QUANTIZED_KEYS if values.get(key)), None)
            if within is not None:
                return f"{section}.{within}"
    return None


def has_tokenizer_files(folder: Path) -> bool:
    """Whether a folder has something to make a tokenizer of."""
    return any(is_listed(folder / file) for file in _TOKENIZERS)


def require_tokenizer_files(name: str, folder: Path) -> None:
    """Refuse a folder that has nothing to make a tokenizer of."""
    if not has_tokenizer_files(folder):
        also = "" if (folder / "tokenizer_config.json").is_file() else " and tokenizer_config.json"
        raise LRQuantError(
            f"model {name}: no tokenizer in its folder: tokenizer.json (or tokenizer.model){also} "
            "missing; copy them from where the model comes from"
        )


def _first_match(folder: Path, patterns: Iterable[tuple[str, str, str]]) -> str | None:
    for pattern, what, advice in patterns:
        if any(folder.glob(pattern)):
            return f"{what}; {advice}"
    return None


def _adapter(folder: Path) -> str:
    base = json_or_empty(folder / ADAPTER).get("base_model_name_or_path")
    of = f" of {base}" if isinstance(base, str) else ""
    return (
        f"an adapter{of} ({ADAPTER}), not a whole model; merge it (peft: merge_and_unload, then "
        "save_pretrained to another folder) and give that"
    )


def _origin(folder: Path) -> str:
    base = json_or_empty(folder / "lrquant.json").get("base_model")
    return f"start from {base if isinstance(base, str) else 'the floating-point model'}"
