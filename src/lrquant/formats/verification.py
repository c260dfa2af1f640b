"""Verification that a checkpoint is what it says: its files, names, shapes, dtypes and values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lrquant.architectures import architecture_of
from lrquant.blocks.plan import Plan
from lrquant.blocks.view import BlockView
from lrquant.blocks.workbench import shape_view
from lrquant.config.config import quantizing_in
from lrquant.errors import LRQuantError
from lrquant.files.manifest import SETTINGS, changed_files, read_manifest
from lrquant.files.whole import JsonObject
from lrquant.formats.choice import formats
from lrquant.formats.expected import bits_of_weights, expected_block
from lrquant.formats.format import Format
from lrquant.learn.checks import parts_of
from lrquant.model.model import Model, count_parameters
from lrquant.model.reading import read_config
from lrquant.model.skeleton import build_skeleton
from lrquant.model.sources import SafetensorsSource

_BF16 = 2


@dataclass(frozen=True)
class Verified:
    """What was found in a checkpoint; `problems` are sentences, none if all is well.

    `bits_per_weight` counts all that the quantised linears' weights take; `stored` are the bytes of
    all tensors, and `as_bf16` what the model they stand for would take in bfloat16.
    """

    problems: list[str]
    bits_per_weight: float
    stored: int
    as_bf16: int


def verify(place: Path) -> Verified:
    """Compare a checkpoint's tensors with what its configuration and its manifest ask for.

    Every file is read once for its hash and once for its values.  Raises LRQuantError for files
    that cannot be read at all.
    """
    manifest = read_manifest(place)
    problems = changed_files(place, manifest)
    source = SafetensorsSource(place)
    asked = quantizing_in(place / SETTINGS)
    model = _model(place, source)
    plan = Plan.of(asked)
    expected, bits = _expected(model, plan, manifest["format"])
    names = source.names()
    problems += [f"{name}: missing" for name in sorted(expected.keys() - names)]
    extra = set(manifest.get("extra_tensors", []))
    problems += [
        f"{name}: not part of the model" for name in sorted(names - expected.keys() - extra)
    ]
    used = _used_bits(model, plan, formats()[manifest["format"]])
    tied = model.skeleton.get_expanded_tied_weights_keys(all_submodels=True)
    stored, elements = 0, count_parameters(model.skeleton, tied)
    for name in sorted(names):
        tensor = source.tensor(name)
        stored += tensor.nbytes
        elements += tensor.numel() * (name in extra)
        if name in expected:
            sentences = _tensor_problems(name, tensor, expected[name], used.get(name, 0))
            problems += [f"{name}: {text}" for text in sentences]
    return Verified(problems, bits, stored, _BF16 * elements)


def _model(place: Path, source: SafetensorsSource) -> Model:
    config = read_config(place)
    architecture = architecture_of(config)
    skeleton = build_skeleton(config, architecture)
    return Model(str(place), skeleton, None, source, architecture, place)


def _expected(model: Model, plan: Plan, name: str) -> tuple[dict[str, Tensor], float]:
    """Every tensor that the checkpoint must hold, on the meta device; bits per weight."""
    if name not in formats():
        raise LRQuantError(f"{model.name}: written as {name!r}, which this lrquant does not know")
    form, dtype = formats()[name], _dtype(model)
    expected: dict[str, Tensor] = {}
    parts = parts_of(model, plan)
    bits = weights = 0
    for part, own in parts:
        added = _added(part)
        for index in range(len(part.blocks)):
            view = shape_view(part, index, own)
            _add_extras(view, part, added)
            block = expected_block(view, form, dtype, form.alone(view.plan, part.published))
            if part is model:
                block_bits, block_weights = bits_of_weights(block, view)
                bits, weights = bits + block_bits, weights + block_weights
            block |= part.published.wide(view.stored)
            full = {f"{part.block_name(index)}.{key}": t for key, t in block.items()}
            expected |= part.published.named(full)
    inside = tuple(part.architecture.blocks + "." for part, _ in parts)
    tied = model.skeleton.get_expanded_tied_weights_keys(all_submodels=True)
    for outer, tensor in model.skeleton.state_dict().items():
        if not outer.startswith(inside) and outer not in tied:
            kept = dtype if tensor.is_floating_point() else tensor.dtype
            expected[outer] = torch.empty(tensor.shape, dtype=kept, device="meta")
    return expected, bits / weights


def _add_extras(view: BlockView, part: Model, added: JsonObject) -> None:
    """Give a block's shapes the biases and shifts that the native format added to it.

    Biases of experts that are linears of their own in it are not added: the block has them in one.
    """
    block, modules = view.plan.name, {name.rpartition(".")[0] for name in view.stored}
    own = {part.published.name(f"{block}.{m}").removeprefix(f"{block}."): m for m in modules}
    for module in [own[name] for name in _of_block(added.get("biases", []), block) if name in own]:
        rows = view.stored[f"{module}.weight"].shape[:1]
        view.stored.setdefault(f"{module}.bias", torch.empty(rows, device="meta"))
    for norm in [own[name] for name in _of_block(added.get("shifts", []), block) if name in own]:
        view.stored[f"{norm}.shift"] = torch.empty_like(view.stored[f"{norm}.weight"])


def _of_block(modules: list[str], block: str) -> list[str]:
    """Names relative to a block, of those that are in it or in every block."""
    own = f"{block}."
    inside = [name.removeprefix(own) for name in modules if name.startswith(own)]
    return inside + [name for name in modules if not name.startswith(block.rpartition(".")[0])]


def _added(part: Model) -> JsonObject:
    """Biases and shifts that the native format added, as its quantization_config names them."""
    values = getattr(part.skeleton.config, "quantization_config", None) or {}
    values = values if isinstance(values, dict) else vars(values)
    tower = values.get("tower") or {}
    return tower if tower.get("blocks") == part.architecture.blocks else values


def _used_bits(model: Model, plan: Plan, form: Format) -> dict[str, int]:
    """How many bits of a row's last word hold codes, by name; 0 if all do."""
    used = {}
    for part, own in parts_of(model, plan):
        for index in range(len(part.blocks)):
            view = shape_view(part, index, own)
            alone = form.alone(view.plan, part.published)
            for name, shape in view.shapes.quantized.items():
                assert shape.grid is not None
                whole = view.matrices[name].parameter.removesuffix(".weight")
                module = name if name in alone else whole
                full = f"{part.block_name(index)}.{module}.weight_packed"
                full = part.published.name(full)
                used[full] = shape.columns * shape.grid.bits % 32
    return used


def _tensor_problems(name: str, tensor: Tensor, expected: Tensor, used: int) -> Iterator[str]:
    """What is wrong with a tensor's shape, dtype or values, or in the unused bits of its words."""
    if tensor.shape != expected.shape:
        yield f"shape {tuple(tensor.shape)}, expected {tuple(expected.shape)}"
    if tensor.dtype != expected.dtype:
        yield f"{tensor.dtype}, expected {expected.dtype}".replace("torch.", "")
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        yield "values that are not finite"
    if name.endswith((".weight_scale", ".scales")) and (tensor <= 0).any():
        yield "scales that are not positive"
    if used and ((tensor[:, -1].long() & 0xFFFFFFFF) >> used).any():
        yield "codes beyond the last column"


def _dtype(model: Model) -> torch.dtype:
    dtype = model.skeleton.config.dtype
    if not isinstance(dtype, torch.dtype):
        raise LRQuantError(f"{model.name}: config.json names no dtype; export the run again")
    return dtype
