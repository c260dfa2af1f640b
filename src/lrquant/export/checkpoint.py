"""Writing a checkpoint folder of any format: shards, index, and all that travels along."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lrquant.blocks.workbench import Workbench, learned_view
from lrquant.config.config import Config
from lrquant.errors import LRQuantError
from lrquant.export.card import model_card
from lrquant.export.format import Format
from lrquant.export.model_config import write_model_config
from lrquant.export.parts import Part, quantized_models
from lrquant.export.protected import check_target
from lrquant.export.reading_back import read_back
from lrquant.export.side_files import copy_side_files
from lrquant.files.manifest import SETTINGS, write_manifest
from lrquant.files.publishing import published
from lrquant.files.whole import save_file
from lrquant.learn.identity import describe_method, dtype_name
from lrquant.model.model import Model
from lrquant.runs.folder import RunFolder
from lrquant.runs.results import MEASURES, seen_from

INDEX = "model.safetensors.index.json"


def check_format(model: Model, config: Config, form: Format) -> None:
    """Refuse a model with a linear whose shape, or a shift, that the format cannot hold."""
    for part, settings in quantized_models(model, config):
        parameters = dict(part.blocks[0].named_parameters())
        for linear in part.linears:
            rows, columns = parameters[f"{linear}.weight"].shape
            reason = form.shape_refusal(rows, columns)
            if reason is not None:
                raise LRQuantError(f"--format {form.name}: {linear}: {reason}")
        if settings.let and settings.let_shift == "always" and not form.shifts:
            _refuse_missing_biases(part, settings, form)


def _refuse_missing_biases(model: Model, config: Config, form: Format) -> None:
    present = {name for name, _ in model.blocks[0].named_parameters()}
    modules = {
        fold.module
        for site in model.sites
        if site.shiftable and site.kind in config.let_sites
        for fold in site.folds
    }
    missing = sorted(module for module in modules if f"{module}.bias" not in present)
    if missing:
        raise LRQuantError(
            f"--let_shift always with {form.name}: shifts need biases that this architecture lacks "
            f"({', '.join(missing)}); learn with --let_shift auto, or use --format lrquant"
        )


def model_dtype(model: Model) -> torch.dtype:
    """The dtype of the model's own weights."""
    return model.source.tensor(next(iter(model.skeleton.state_dict()))).dtype


def checkpoint_dtype(model: Model, config: Config, form: Format) -> torch.dtype:
    """That of a checkpoint's floating-point tensors: what is asked for, or the model's own."""
    asked = config.save_dtype
    return form.dtype(getattr(torch, asked) if asked else model_dtype(model))


@torch.no_grad()
def save_checkpoint(
    workbench: Workbench, config: Config, folder: RunFolder, target: Path, form: Format
) -> None:
    """Publish `target` as a Hugging Face checkpoint, one shard a block, when it is whole."""
    model = workbench.model
    check_target(config, target)
    check_format(model, config, form)
    try:
        with published(target, config.overwrite) as place:
            parts = _write_tensors(workbench, config, folder, place, form)
            write_small_files(model, config, place, form, parts)
            dtype = checkpoint_dtype(model, config, form)
            read_back(workbench, _quantized(workbench, config, folder), place, form, dtype)
            facts = _facts(model, config, folder, form)
            (place / "README.md").write_text(model_card(config, form, facts), encoding="utf-8")
            write_manifest(place, facts)
    except (OSError, SafetensorError) as error:
        raise LRQuantError(
            f"checkpoint {target}: cannot be written ({error}); free some space or use another "
            f"--save_dir; the run is whole: `lrquant export {folder.path} DIR`"
        ) from error


def _facts(model: Model, config: Config, folder: RunFolder, form: Format) -> dict[str, Any]:
    """What a checkpoint says of itself; nothing that differs between two exports of a run."""
    results = RunFolder(Path(config.output_dir)).results()
    results = seen_from(results, folder.identity["precision"])
    return {
        "format": form.name,
        "scheme": config.quantization.describe(),
        "tower": config.vision_quantization.describe() if config.vision_quantization else "",
        "auto_class": model.architecture.auto_class.__name__,
        "base_model": config.net_name,
        "method": describe_method(config),
        "calibration": {"text": folder.identity["calibration"], **folder.identity["data"]},
        "precision": folder.identity["precision"],
        "results": {key: results[key] for key in _RESULTS if key in results},
        "extra_tensors": sorted(model.source.extra_names()),
    }


_RESULTS = (
    *("method_name", "scheme", "versions", "unpacked_from", "threads", "cpu"),
    *(*MEASURES, "others", "max_drop"),
)


def _write_tensors(
    workbench: Workbench, config: Config, folder: RunFolder, place: Path, form: Format
) -> list[Part]:
    """Write all shards and their index; returns the quantised parts."""
    model = workbench.model
    dtype = checkpoint_dtype(model, config, form)
    outer = model.outer_tensors(torch.device("cpu"), torch.float32, head=True)
    outer = {name: tensor for name, tensor in outer.items() if name not in model.tied_names}
    extra = model.source.extra_names()
    tower = workbench.tower
    if tower is not None and config.vision_scheme is None:
        outer |= _stored_blocks(tower)
    weight_map: dict[str, str] = {}
    size = 0

    def write(name: str, shard: dict[str, Tensor]) -> None:
        nonlocal size
        whole = {key: tensor.cpu().contiguous() for key, tensor in shard.items()}
        _refuse_overflow({k: t for k, t in whole.items() if k not in extra}, form)
        save_file(whole, place / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(whole, name))
        size += sum(tensor.nbytes for tensor in whole.values())

    cast = {n: t.to(dtype) if t.is_floating_point() else t for n, t in outer.items()}
    write("model-outer.safetensors", cast | {n: model.source.tensor(n) for n in extra})
    parts = []
    for bench, settings, learned in _quantized(workbench, config, folder):
        file = "model" if bench is workbench else "model-tower"
        for index in range(len(bench.model.blocks)):
            frozen = learned_view(bench, settings, learned, index).freeze()
            prefix = bench.model.block_name(index) + "."
            tensors = form.tensors(frozen, settings.quantization, dtype)
            write(f"{file}-{index:04d}.safetensors", {prefix + n: t for n, t in tensors.items()})
        blocks = bench.model.architecture.blocks
        parts.append(Part(blocks, settings.quantization, sorted(tensors)))
    index_text = json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=1)
    (place / INDEX).write_text(index_text, encoding="utf-8")
    return parts


def _quantized(
    workbench: Workbench, config: Config, folder: RunFolder
) -> list[tuple[Workbench, Config, RunFolder]]:
    """The language part, and a vision tower that has a scheme, with what was learned of each."""
    tower = workbench.tower
    parts = [(workbench, config, folder)]
    if tower is not None and config.vision_scheme is not None:
        parts.append((tower, config.for_tower(), folder.tower))
    return parts


def _stored_blocks(workbench: Workbench) -> dict[str, Tensor]:
    """A tower's own tensors by their full names."""
    model = workbench.model
    return {
        f"{model.block_name(index)}.{name}": tensor
        for index in range(len(model.blocks))
        for name, tensor in model.block_tensors(index, torch.device("cpu")).items()
    }


def _refuse_overflow(tensors: dict[str, Tensor], form: Format) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise LRQuantError(
                f"--format {form.name}: {name} has values that are not finite, or too large for "
                f"{dtype_name(tensor.dtype)}; use --format dequantized, or learn again"
            )


def write_small_files(
    model: Model, config: Config, place: Path, form: Format, parts: Sequence[Part]
) -> None:
    """Write all of a checkpoint but its tensors and index."""
    inside = tuple(part.blocks + "." for part in parts)
    outside = [
        name
        for name, module in model.skeleton.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(inside)
    ]
    extra = {name.rpartition(".")[0] for name in model.source.extra_names()}
    quantization = form.quantization_config(parts, [*outside, *sorted(extra - {""})])
    write_model_config(model, checkpoint_dtype(model, config, form), quantization, place)
    copy_side_files(model, place)
    (place / SETTINGS).write_text(config.to_yaml(), encoding="utf-8")
