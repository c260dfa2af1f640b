"""config.json of a checkpoint: the source's own, with what quantisation adds or must change."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from lrquant.files.whole import JsonObject, read_json
from lrquant.formats.side_files import without_local_keys
from lrquant.model.device import dtype_name
from lrquant.model.model import Model

_DTYPES = ("dtype", "torch_dtype")  # transformers 5 and 4
_LOCAL = "_attn_implementation"
_NEWER = ("axial", "proportional")  # kinds of RoPE that transformers 4 has not


def write_model_config(
    model: Model, dtype: torch.dtype, quantization: JsonObject | None, place: Path
) -> None:
    """Write config.json for the model's weights in `dtype`, quantised as `quantization` says."""
    values = _source_config(model)
    values = _with_dtype(values, dtype_name(dtype))
    values |= dict.fromkeys(_DTYPES, dtype_name(dtype))
    values["architectures"] = [type(model.skeleton).__name__]
    if model.skeleton.get_output_embeddings() is not None:
        _set_ties(values, bool(model.tied_names))
    for section in (values, values.get("text_config")):
        if isinstance(section, dict):
            section.update(_older_rope(section))
    if quantization is not None:
        values["quantization_config"] = quantization
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    (place / "config.json").write_text(text, encoding="utf-8")


def _source_config(model: Model) -> JsonObject:
    """The folder's own JSON; of a model without a folder, what transformers writes of it.

    Nothing of how the source's own weights were packed.
    """
    if model.folder is not None:
        values = read_json(model.folder / "config.json")
    else:
        config = model.skeleton.config
        values = json.loads(config.to_json_string(use_diff=False))
    values.pop("quantization_config", None)
    kept: JsonObject = without_local_keys(values)
    return {key: value for key, value in kept.items() if not key.startswith(_LOCAL)}


def _with_dtype(values: JsonObject, name: str) -> JsonObject:
    """The same with the dtype of every section that names one replaced."""
    replaced = {}
    for key, value in values.items():
        nested = isinstance(value, dict) and key.endswith("_config")
        replaced[key] = name if key in _DTYPES else _with_dtype(value, name) if nested else value
    return replaced


def _set_ties(values: JsonObject, tied: bool) -> None:
    """Say of the language head what the tensors say, where either version of transformers looks."""
    values["tie_word_embeddings"] = tied
    if isinstance(values.get("text_config"), dict):
        values["text_config"]["tie_word_embeddings"] = tied


def _older_rope(values: JsonObject) -> JsonObject:
    """transformers 4's keys for `rope_parameters`, where a part has these alone."""
    rope = values.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" in values:
        return {}
    if "full_attention" in rope:
        sliding = rope.get("sliding_attention") or {}
        local = {"rope_local_base_freq": sliding["rope_theta"]} if "rope_theta" in sliding else {}
        older: JsonObject = _older_rope({"rope_parameters": rope["full_attention"]})
        return {**older, **local} if older else {}
    kept = dict(rope)
    if "rope_theta" not in kept or kept.get("rope_type") in _NEWER:
        return {}
    older = {"rope_theta": kept.pop("rope_theta")}
    if "partial_rotary_factor" in kept:
        older["partial_rotary_factor"] = kept.pop("partial_rotary_factor")
    plain = kept.keys() <= {"rope_type"} and kept.get("rope_type", "default") == "default"
    return {**older, "rope_scaling": None if plain else kept}
