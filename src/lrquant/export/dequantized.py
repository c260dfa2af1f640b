"""A plain checkpoint: dense weights that went through the grid, for software without quantizers.

Activation quantization is not part of it: with 16-bit activations it computes what was learned,
else only the weights do.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lrquant.config import Config
from lrquant.errors import LRQuantError
from lrquant.model import Model
from lrquant.workbench import Workbench, learned_view
from lrquant.workdir import RunFolder

INDEX = "model.safetensors.index.json"
MADE_BY = "lrquant.yaml"


def check_target(model: Model, config: Config, target: Path) -> None:
    """Refuse, before any hour is spent, what could not be written or would destroy other files."""
    if target.resolve() == Path(config.output_dir).resolve():
        raise LRQuantError(f"--save_dir {target}: this is the run folder; use another one")
    if target.exists() and not target.is_dir():
        raise LRQuantError(f"--save_dir {target}: a file; use another folder")
    if target.is_dir() and any(target.iterdir()) and not (target / MADE_BY).is_file():
        raise LRQuantError(
            f"--save_dir {target}: holds files that are no checkpoint of lrquant and would be "
            "deleted; use a new folder"
        )
    if config.let and config.let_shift == "always":
        _refuse_missing_biases(model, config)


def _refuse_missing_biases(model: Model, config: Config) -> None:
    present = {name for name, _ in model.blocks[0].named_parameters()}
    sites = model.architecture.sites(model.skeleton.config)
    modules = {
        fold.module
        for site in sites
        if site.shiftable and site.kind in config.let_sites
        for fold in site.folds
    }
    missing = sorted(module for module in modules if f"{module}.bias" not in present)
    if missing:
        raise LRQuantError(
            f"--save_dir with --let_shift always: shifts need biases that this architecture lacks "
            f"({', '.join(missing)}); learn with --let_shift auto"
        )


@torch.no_grad()
def save_dequantized(workbench: Workbench, config: Config, folder: RunFolder, target: Path) -> None:
    """Write `target` as a Hugging Face checkpoint, one shard a block, and rename it when whole."""
    model = workbench.model
    check_target(model, config, target)
    target = target.resolve()
    temporary = target.with_name(target.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        shards: dict[str, Path] = {}
        outer = model.outer_tensors(torch.device("cpu"), torch.float32, head=True)
        if model.skeleton.config.tie_word_embeddings:
            outer.pop("lm_head.weight", None)
        dtype = model.source.tensor(next(iter(outer))).dtype
        outer |= {name: model.source.tensor(name) for name in model.source.extra_names()}
        _save_shard(temporary / "model-outer.safetensors", outer, dtype, shards)
        for index in range(len(model.blocks)):
            view = learned_view(workbench, config, folder, index)
            tensors = view.freeze().dense()
            prefix = model.block_name(index) + "."
            named = {prefix + name: tensor for name, tensor in tensors.items()}
            _save_shard(temporary / f"model-{index:04d}.safetensors", named, dtype, shards)
        weight_map = {name: path.name for name, path in shards.items()}
        index_text = json.dumps({"metadata": {}, "weight_map": weight_map}, indent=1)
        (temporary / INDEX).write_text(index_text, encoding="utf-8")
        saved = type(model.skeleton.config).from_dict(model.skeleton.config.to_dict())
        saved.dtype = dtype
        saved.architectures = [type(model.skeleton).__name__]
        saved.save_pretrained(temporary)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(temporary)
        generation = (model.folder or Path()) / "generation_config.json"
        if model.folder is not None and generation.is_file():
            shutil.copyfile(generation, temporary / generation.name)
        (temporary / MADE_BY).write_text(config.to_yaml(), encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        temporary.replace(target)
    except (OSError, SafetensorError) as error:
        raise LRQuantError(
            f"checkpoint {target}: cannot be written ({error}); free some space or use another "
            "--save_dir, then `--epochs 0 --resume RUN --save_dir DIR`"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _save_shard(
    path: Path, tensors: dict[str, Tensor], dtype: torch.dtype, shards: dict[str, Path]
) -> None:
    save_file(
        {name: tensor.cpu().to(dtype).contiguous() for name, tensor in tensors.items()},
        path,
        metadata={"format": "pt"},
    )
    shards.update(dict.fromkeys(tensors, path))
