"""Writing a checkpoint folder of any format: shards, index, and all that travels along."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lrquant.blocks.attention import attention_config
from lrquant.blocks.plan import BlockPlan, Plan
from lrquant.blocks.view import BlockView
from lrquant.blocks.workbench import Workbench, learned_view, shape_view
from lrquant.config.groups import Origin
from lrquant.config.scheme import Scheme
from lrquant.errors import LRQuantError
from lrquant.files.manifest import SETTINGS, write_manifest
from lrquant.files.publishing import published
from lrquant.files.whole import JsonObject, save_file
from lrquant.formats.card import model_card
from lrquant.formats.expected import require_packable
from lrquant.formats.format import Format
from lrquant.formats.hub import push, require_repository
from lrquant.formats.model_config import write_model_config
from lrquant.formats.parts import Part
from lrquant.formats.protected import check_target
from lrquant.formats.reading_back import read_back
from lrquant.formats.side_files import copy_side_files
from lrquant.learn.checks import parts_of
from lrquant.learn.identity import describe_method
from lrquant.model.device import dtype_name
from lrquant.model.model import Model
from lrquant.model.publication import publication_of
from lrquant.model.published import Published
from lrquant.numerics.hadamard import hadamard_size
from lrquant.runs.folder import RunFolder
from lrquant.runs.results import VERDICT, Results, kinds, seen_from

logger = logging.getLogger("lrquant")
INDEX = "model.safetensors.index.json"


def check_format(model: Model, plan: Plan, form: Format, dtype: torch.dtype) -> None:
    """Refuse a shape, or something learned, that the format can't hold."""
    for part, own in parts_of(model, plan):
        for index in range(len(part.blocks)):
            view = shape_view(part, index, own)
            for name, shape in view.shapes.quantized.items():
                reason = form.shape_refusal(shape.rows, shape.columns)
                if reason is not None:
                    raise LRQuantError(f"--format {form.name}: {name}: {reason}")
            alone = form.alone(view.plan, part.published)
            schemes = {view.plan.schemes[name] for name in alone}
            reason = form.experts(own.schemes, schemes) if schemes else None
            if reason is not None:
                raise LRQuantError(f"--format {form.name}: {reason}")
            needed = [each.needs(view.shapes).items() for each in own.ingredients]
            for what, why in (pair for needs in needed for pair in needs):
                if what not in form.holds:
                    raise LRQuantError(f"--format {form.name}: {why}")
            require_packable(view, form, dtype, alone)


def model_dtype(model: Model) -> torch.dtype:
    """The dtype of the model's own weights."""
    return model.source.tensor(next(iter(model.skeleton.state_dict()))).dtype


def checkpoint_dtype(model: Model, plan: Plan, form: Format) -> torch.dtype:
    """That of a checkpoint's floating-point tensors: what is asked for, or the model's own."""
    return form.dtype(plan.scale_dtype or model_dtype(model))


@torch.no_grad()
def save_checkpoint(
    workbench: Workbench, origin: Origin, folder: RunFolder, target: Path, form: Format
) -> None:
    """Publish `target` as a Hugging Face checkpoint, one shard a block, when it is whole."""
    model, plan = workbench.model, workbench.plan
    check_target(origin.places, target)
    dtype = checkpoint_dtype(model, plan, form)
    check_format(model, plan, form, dtype)
    try:
        with published(target, origin.places.overwrite) as place:
            parts = _write_tensors(workbench, folder, place, form)
            write_small_files(model, plan, place, form, parts)
            (place / SETTINGS).write_text(origin.settings, encoding="utf-8")
            read_back(_quantized(workbench, folder), place, form, dtype)
            facts = _facts(workbench, origin, folder, form)
            card = model_card(plan.schemes, origin.seed, form, facts)
            (place / "README.md").write_text(card, encoding="utf-8")
            write_manifest(place, facts)
    except (OSError, SafetensorError) as error:
        raise LRQuantError(
            f"checkpoint {target}: cannot be written ({error}); free some space or use another "
            f"--save_dir; the run is whole: `lrquant export {folder.path} DIR`"
        ) from error
    if origin.repository is not None:
        whole = require_repository(origin.repository, origin.places.overwrite)
        named = model_card(plan.schemes, origin.seed, form, facts, whole)
        logger.info("on the hub: %s", push(target, whole, named, origin.places.overwrite))


def _facts(workbench: Workbench, origin: Origin, folder: RunFolder, form: Format) -> JsonObject:
    """What a checkpoint says of itself; nothing that differs between two exports of a run."""
    model, schemes = workbench.model, workbench.plan.schemes
    published = publication_of(origin.places.model, model.folder)
    results = RunFolder(Path(origin.places.output_dir)).results()
    results = seen_from(results, folder.identity["precision"])
    return {
        "format": form.name,
        "scheme": schemes.describe(),
        "tower": schemes.tower.describe() if schemes.tower else "",
        "auto_class": model.architecture.auto_class.__name__,
        "base_model": origin.net_name,
        "base_repository": published.repository,
        "published": dict(published.told),
        "dtype": dtype_name(checkpoint_dtype(model, workbench.plan, form)),
        "base_weights": folder.identity["model"]["weights"],
        "method": describe_method(workbench.plan, origin.learning),
        "calibration": {"text": folder.identity["calibration"], **folder.identity["data"]},
        "precision": folder.identity["precision"],
        "results": {key: value for key, value in results.items() if key in _said(results)},
        "extra_tensors": sorted(model.source.extra_names()),
    }


def _said(results: Results) -> set[str]:
    """What of the run's results a checkpoint repeats."""
    about = {"method_name", "scheme", "versions", "unpacked_from", "threads", "cpu", "gpu"}
    return {*about, "examples", *kinds(results), "others", VERDICT}


def _write_tensors(
    workbench: Workbench, folder: RunFolder, place: Path, form: Format
) -> list[Part]:
    """Write all shards and their index; returns the quantised parts."""
    model = workbench.model
    dtype = checkpoint_dtype(model, workbench.plan, form)
    outer = model.outer_tensors(torch.device("cpu"), torch.float32, head=True)
    outer = {name: tensor for name, tensor in outer.items() if name not in model.tied_names}
    extra = model.source.extra_names()
    tower = workbench.tower
    if tower is not None and workbench.plan.schemes.tower is None:
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
    for bench, learned in _quantized(workbench, folder):
        file = "model" if bench is workbench else "model-tower"
        names: list[str] = []
        linears: dict[str, Scheme] = {}
        attentions: dict[str, Scheme] = {}
        sizes: dict[str, int] = {}
        for index in range(len(bench.model.blocks)):
            view = learned_view(bench, learned, index)
            published, prefix = bench.model.published, bench.model.block_name(index) + "."
            frozen = view.written().apart(form.alone(view.plan, published))
            own = form.tensors(frozen, dtype) | published.wide(frozen.others)
            tensors = published.named({prefix + name: tensor for name, tensor in own.items()})
            write(f"{file}-{index:04d}.safetensors", tensors)
            names += sorted(tensors)
            linears |= linear_schemes(view.plan, published, form)
            attentions |= attention_schemes(bench.model, view.plan)
            sizes |= hadamard_sizes(view, published, form)
        blocks = bench.model.architecture.blocks
        parts.append(Part(blocks, bench.plan.schemes, linears, names, attentions, sizes))
    index_text = json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=1)
    (place / INDEX).write_text(index_text, encoding="utf-8")
    return parts


def _quantized(workbench: Workbench, folder: RunFolder) -> list[tuple[Workbench, RunFolder]]:
    """The language part, and a vision tower that has a scheme, with what was learned of each."""
    tower = workbench.tower
    parts = [(workbench, folder)]
    if tower is not None and workbench.plan.schemes.tower is not None:
        parts.append((tower, folder.tower))
    return parts


def linear_schemes(plan: BlockPlan, published: Published, form: Format) -> dict[str, Scheme]:
    """The scheme of each linear of a block by its full name; parts of one have the same."""
    return {full: plan.schemes[own] for full, own in _linears(plan, published, form).items()}


def hadamard_sizes(view: BlockView, published: Published, form: Format) -> dict[str, int]:
    """That of the Hadamard matrix of each linear of a block that has one, by its full name."""
    return {
        full: hadamard_size(view.shapes.matrices[own].columns)
        for full, own in _linears(view.plan, published, form).items()
        if view.plan.schemes[own].hadamard
    }


def _linears(plan: BlockPlan, published: Published, form: Format) -> dict[str, str]:
    """The last matrix of each linear of a block, by the linear's full name.

    Matrices of experts that have tensors of their own, or would if they were quantised, are too.
    """
    alone, linears = published.alone(plan.name), {}
    for name, matrix in plan.matrices.items():
        single = name in alone or (form.experts_apart and matrix.expert is not None)
        own = name if single else matrix.parameter.removesuffix(".weight")
        if single or (matrix.expert is None and matrix.parameter.endswith(".weight")):
            linears[published.name(f"{plan.name}.{own}")] = name
    return linears


def _kept(model: Model) -> list[str]:
    """Modules inside the blocks whose weights stay in floating point, such as routers."""
    return [
        model.published.name(f"{model.block_name(index)}.{name.removesuffix('.weight')}")
        for index in range(len(model.blocks))
        for name in model.architecture.kept(model.config, index)
        if name.endswith(".weight")
    ]


def attention_schemes(model: Model, plan: BlockPlan) -> dict[str, Scheme]:
    """The scheme of Q, K and V by the full name of a block's attention; none without one."""
    attention = model.skeleton.get_submodule(plan.attention_module)
    there = attention_config(attention) is not None
    return {plan.attention_module: plan.attention_scheme} if there else {}


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
    model: Model, plan: Plan, place: Path, form: Format, parts: Sequence[Part]
) -> None:
    """Write configuration, tokenizer and what else travels along with tensors."""
    held = {name for part in parts for name in part.linears}
    modules = model.skeleton.named_modules()
    linears = [model.published.name(n) for n, each in modules if isinstance(each, nn.Linear)]
    outside = [name for name in linears if name not in held]
    extra = {name.rpartition(".")[0] for name in model.source.extra_names()}
    outside += [*sorted(extra - {""}), *_kept(model)]
    quantization = form.quantization_config(parts, outside)
    write_model_config(model, checkpoint_dtype(model, plan, form), quantization, place)
    copy_side_files(model, place)
