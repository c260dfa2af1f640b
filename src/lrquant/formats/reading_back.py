"""A written checkpoint held against what was measured, by its files and its config.json alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from lrquant.architectures import architecture_of
from lrquant.architectures.matrix import Matrix
from lrquant.blocks.assembly import assembled, assembled_biases
from lrquant.blocks.frozen import FrozenBlock
from lrquant.blocks.handed import HandedOn
from lrquant.blocks.head import Head
from lrquant.blocks.inputs import BlockInputs
from lrquant.blocks.runner import INPUT_FACTOR_SUFFIX, SHIFT_SUFFIX, BlockRunner
from lrquant.blocks.streams import Stream
from lrquant.blocks.stubs import Arguments
from lrquant.blocks.workbench import Workbench, learned_view
from lrquant.errors import LRQuantError
from lrquant.files.whole import JsonObject, read_json
from lrquant.formats.format import Format
from lrquant.model.model import Model
from lrquant.model.reading import read_config
from lrquant.model.skeleton import build_skeleton
from lrquant.model.sources import SafetensorsSource, SkeletonSource, WeightSource
from lrquant.model.sources.checks import first_line
from lrquant.numerics.hadamard import hadamard
from lrquant.runs.folder import RunFolder

_PIECE = 1 << 24  # elements compared at once
_UNDERFLOW = 2.0**-20  # below it a half-precision scale of up to 15 steps loses bits
_SUMS = 2.0**-20  # of the length of a row, for float32 sums in another order
_SAME = 1e-4  # of the largest output, for sums in another order
_TOKENS = 16
_HEAD_TOKENS = 4
Decoded = Callable[[str], dict[str, Tensor]]


class DecodedSource(WeightSource):
    """A checkpoint's tensors with the quantised blocks, whose full names are `blocks`, decoded.

    Inside these blocks it serves the names of the skeleton; `block` gives all of one of them, one
    at a time in memory.
    """

    def __init__(self, place: Path, form: Format, model: Model, blocks: list[str]) -> None:
        self.origin, self._place = str(place), place
        self._stored, self._form = SafetensorsSource(place), form
        values = read_json(place / "config.json")
        self._quantization: JsonObject = values.get("quantization_config") or {}
        self._inside = tuple(name + "." for name in blocks)
        self._model = model
        self._shapes = {
            name: tuple(tensor.shape)
            for name, tensor in model.skeleton.state_dict().items()
            if name.startswith(self._inside)
        }
        self._last: tuple[str, dict[str, Tensor]] | None = None

    def names(self) -> frozenset[str]:
        outer = {name for name in self._stored.names() if not name.startswith(self._inside)}
        return frozenset(outer | self._shapes.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name] if name in self._shapes else self._stored.shape(name)

    def dtype(self, name: str) -> str:
        return "float32" if name in self._shapes else self._stored.dtype(name)

    def tensor(self, name: str) -> Tensor:
        if name not in self._shapes:
            return self._stored.tensor(name)
        prefix = next(prefix for prefix in self._inside if name.startswith(prefix))
        return self.block(prefix.removesuffix("."))[name.removeprefix(prefix)]

    def block(self, name: str) -> dict[str, Tensor]:
        """Every tensor of a block as the model has it: see `written`; experts joined."""
        prefix, published = name + ".", self._model.published
        loaded = published.loaded({prefix + n: t for n, t in self.written(name).items()})
        return self._joined(name, {n.removeprefix(prefix): t for n, t in loaded.items()})

    def _joined(self, name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same with experts put together that are apart in this format alone."""
        path, _, index = name.rpartition(".")
        if path != self._model.architecture.blocks:
            return tensors
        matrices = {m.name: m for m in self._model.matrices(int(index)) if m.expert is not None}
        weights = {n: tensors[f"{n}.weight"] for n in matrices if f"{n}.weight" in tensors}
        biases = {n: tensors[f"{n}.bias"] for n in weights if f"{n}.bias" in tensors}
        left = {n: t for n, t in tensors.items() if n.rpartition(".")[0] not in weights}
        return left | assembled(matrices, weights) | assembled_biases(matrices, biases)

    def written(self, name: str) -> dict[str, Tensor]:
        """Every tensor of a block, decoded to float32, shifts and input factors as stored."""
        if self._last is None or self._last[0] != name:
            prefix = name + "."
            stored = {
                key.removeprefix(prefix): self._stored.tensor(key)
                for key in self._stored.names()
                if key.startswith(prefix)
            }
            decoded = self._decoded(stored, name)
            self._last = name, {key: tensor.float() for key, tensor in decoded.items()}
        return self._last[1]

    def _decoded(self, stored: dict[str, Tensor], name: str) -> dict[str, Tensor]:
        try:
            decoded = self._form.decode(stored, name, self._quantization)
        except (RuntimeError, ValueError, LookupError) as error:
            _refuse(self._place, f"{name} cannot be decoded ({first_line(error)})")
        for key, tensor in decoded.items():
            wanted = self._shapes.get(f"{name}.{key}", tensor.shape)
            if tensor.shape != wanted:
                said = f"{list(tensor.shape)}, by config.json {list(wanted)}"
                _refuse(self._place, f"{name}.{key} is {said}")
        return decoded

    def fingerprint(self) -> str:
        return self._stored.fingerprint()


@torch.no_grad()
def read_back(
    quantized: list[tuple[Workbench, RunFolder]],
    place: Path,
    form: Format,
    dtype: torch.dtype,
) -> None:
    """Refuse a checkpoint in `place` that is not what was measured, rounded to `dtype`.

    Every tensor is compared: those outside the blocks, and each block's decoded ones with what the
    run learned.  Then what config.json makes of them: the embedding of some tokens, the outputs of
    one block of each kind, and the head's.
    """
    workbench = quantized[0][0]
    model = workbench.model
    names = [
        bench.model.block_name(index)
        for bench, _ in quantized
        for index in range(len(bench.model.blocks))
    ]
    written, source = _open(place, form, names)
    _compare_outside(model, written, tuple(name + "." for name in names), dtype, place)
    for bench, learned in quantized:
        for index in range(len(bench.model.blocks)):
            name, published = bench.model.block_name(index), bench.model.published
            view = learned_view(bench, learned, index)
            frozen = view.written().apart(form.alone(view.plan, published))
            decoded = {f"{name}.{key}": tensor for key, tensor in source.written(name).items()}
            expected = {f"{name}.{n}": t for n, t in (frozen.dense() | frozen.input_clips).items()}
            mixed = {published.name(f"{name}.{n}"): own for n, own in _mixed(frozen).items()}
            _compare_block(decoded, published.named(expected), mixed, dtype, place)
    if not model.architecture.reads_pixels:
        _compare_outputs(quantized[0], written, source, dtype, place)
    _compare_heads(workbench, written, dtype, place)


def _open(place: Path, form: Format, blocks: list[str]) -> tuple[Model, DecodedSource]:
    """The model that config.json and the tensors are, as transformers would put it together."""
    config = read_config(place)
    architecture = architecture_of(config)
    skeleton = build_skeleton(config, architecture)
    bare = Model(str(place), skeleton, None, SafetensorsSource(place), architecture)
    source = DecodedSource(place, form, bare, blocks)
    return dataclasses.replace(bare, source=SkeletonSource(source, skeleton)), source


def _compare_outside(
    model: Model, written: Model, inside: tuple[str, ...], dtype: torch.dtype, place: Path
) -> None:
    for name in model.skeleton.state_dict():
        if not name.startswith(inside):
            _require_rounded(
                name, written.source.tensor(name), model.source.tensor(name), dtype, place
            )


def _mixed(frozen: FrozenBlock) -> dict[str, list[tuple[Matrix, bool]]]:
    """Parameters in which matrices went through Hadamard ones: all in them, and whether they did.

    Those were rounded as they are stored, and each value of the plain weight has its part of that.
    """
    parameters: dict[str, list[tuple[Matrix, bool]]] = {}
    for name, lies in frozen.layout.items():
        matrix = frozen.matrices.get(name)
        rotated = matrix is not None and matrix.scheme.hadamard
        parameters.setdefault(lies.parameter, []).append((lies, rotated))
    return {name: own for name, own in parameters.items() if any(rotated for _, rotated in own)}


def _compare_block(
    written: dict[str, Tensor],
    expected: dict[str, Tensor],
    mixed: Mapping[str, list[tuple[Matrix, bool]]],
    dtype: torch.dtype,
    place: Path,
) -> None:
    """All tensors of a block; `mixed` are those of `_mixed`."""
    for factor in [key for key in written if key.endswith(INPUT_FACTOR_SUFFIX)]:
        weight = factor.removesuffix(INPUT_FACTOR_SUFFIX) + ".weight"
        written[weight] = written[weight] * written.pop(factor)
    if odd := sorted(written.keys() ^ expected.keys()):
        _refuse(place, f"{odd[0]} is missing or left over")
    for key, tensor in expected.items():
        if written[key].shape != tensor.shape or key not in mixed:
            _require_rounded(key, written[key], tensor, dtype, place)
            continue
        for matrix, rotated in mixed[key]:
            own, wanted = matrix.of(written[key]).cpu().float(), matrix.of(tensor).cpu().float()
            if rotated and _farthest(own, wanted, dtype) is not None:  # not rounded as plain
                _require_rounded(key, hadamard(own), hadamard(wanted), dtype, place, _SUMS)
            elif not rotated:
                _require_rounded(key, own, wanted, dtype, place)


def _require_rounded(
    name: str,
    written: Tensor,
    expected: Tensor,
    dtype: torch.dtype,
    place: Path,
    sums: float = 0.0,
) -> None:
    """Each value is what was measured, to one rounding to `dtype`; `sums` as for `_farthest`."""
    if written.shape != expected.shape:
        _refuse(place, f"{name} is {list(written.shape)}, not {list(expected.shape)}")
    if not expected.is_floating_point():
        if not torch.equal(written, expected.to(written.device)):
            _refuse(place, f"{name} differs")
        return
    distance = _farthest(written, expected, dtype, sums)
    if distance is not None:
        _refuse(place, f"{name} is up to {distance:.3g} off")


def _farthest(
    written: Tensor, expected: Tensor, dtype: torch.dtype, sums: float = 0.0
) -> float | None:
    """How far values of one shape are apart, if by more than one rounding to `dtype`; or None.

    Those that are sums may be `sums` times the length of their row (out, in) apart beside that.
    """
    rows = [
        each.reshape(each.shape[0] if each.dim() > 1 else 1, -1) for each in (written, expected)
    ]
    step = max(1, _PIECE // max(1, rows[0].shape[1]))
    for own, other in zip(*(each.split(step) for each in rows), strict=True):
        wanted = other.cpu().float()
        distance = (own.cpu().float() - wanted).abs_()
        allowed = wanted.abs().mul_(torch.finfo(dtype).eps).add_(_UNDERFLOW)
        if sums:
            allowed += sums * torch.linalg.vector_norm(wanted, dim=-1, keepdim=True)
        if not (distance <= allowed).all():
            return float(distance.max())
    return None


def _compare_outputs(
    language: tuple[Workbench, RunFolder],
    written: Model,
    source: DecodedSource,
    dtype: torch.dtype,
    place: Path,
) -> None:
    """Embedding of some tokens, and one block of each kind, of both models."""
    bench, learned = language
    model, device = bench.model, torch.device("cpu") if bench.by_expert else bench.device
    limit = getattr(model.config, "max_position_embeddings", None) or _TOKENS
    ids = torch.arange(min(_TOKENS, limit))[None] % model.config.vocab_size
    (own, states), (other, embedded) = (_embedded(m, ids, device) for m in (model, written))
    _require_alike("the embedding", embedded, states, dtype, place)
    handed = [HandedOn({}) for _ in range(3)]
    for index in _kinds(model):
        name = model.block_name(index)
        view = learned_view(bench, learned, index)
        frozen = view.written().tensors(torch.float32)
        expected = {key: tensor.float() for key, tensor in frozen.items()}
        decoded = {key: tensor.to(device) for key, tensor in source.block(name).items()}
        learned_as, plain = view.plan.rotated, frozenset[str]()
        runs = [
            (model, own, expected, learned_as),
            (model, own, decoded, plain),
            (written, other, decoded, plain),
        ]
        outputs = [
            _output(m, index, t, states, entry.arguments(0, index, left), rotated)
            for (m, entry, t, rotated), left in zip(runs, handed, strict=True)
        ]
        _require_alike(f"what config.json makes of {name}", outputs[2], outputs[1], None, place)
        _require_alike(f"the output of {name}", outputs[2], outputs[0], dtype, place)


def _embedded(model: Model, ids: Tensor, device: torch.device) -> tuple[BlockInputs, Tensor]:
    """The arguments of all blocks for some tokens, and the first one's hidden states."""
    entry = BlockInputs(model, ids, 1, device)
    stream = Stream(entry.shape, torch.float32, device, "host")
    entry.embed(stream)
    return entry, stream.read(entry.batches[0], 0)


def _kinds(model: Model) -> list[int]:
    """The first block of each kind of attention, and the last; all, where they read others'."""
    last = len(model.blocks) - 1
    if model.architecture.hands_on is not None:
        return list(range(last + 1))
    kinds = list(getattr(model.config, "layer_types", None) or [])[: last + 1]
    return sorted({*(kinds.index(kind) for kind in kinds), last})


def _output(
    model: Model,
    index: int,
    tensors: dict[str, Tensor],
    states: Tensor,
    arguments: Arguments,
    rotated: Collection[str],
) -> Tensor:
    shifted = [n.removesuffix(SHIFT_SUFFIX) for n in tensors if n.endswith(SHIFT_SUFFIX)]
    readers = dict.fromkeys(m.reads for m in model.matrices(index) if m.reads is not None)
    runner = BlockRunner(
        model.blocks[index],
        readers,
        None,
        torch.float32,
        shifted,
        own_attention=model.architecture.own_attention,
        residuals=model.residuals,
        rotated=rotated,
    )
    with runner:
        return runner(tensors, states, arguments)


def _compare_heads(workbench: Workbench, written: Model, dtype: torch.dtype, place: Path) -> None:
    model, device = workbench.model, workbench.device
    generator = torch.Generator().manual_seed(0)
    states = torch.randn((1, _HEAD_TOKENS, model.state_size), generator=generator).to(device)
    own, expected = (Head(m, device, workbench.dtype)(states) for m in (written, model))
    _require_alike("the head's output", own, expected, dtype, place)


def _require_alike(
    what: str, written: Tensor, expected: Tensor, dtype: torch.dtype | None, place: Path
) -> None:
    """Outputs agree to the rounding of weights to `dtype`; None: to that of float32 sums."""
    allowed = _SAME if dtype is None else max(_SAME, 16 * torch.finfo(dtype).eps)
    written, expected = written.float(), expected.float()
    distance = float((written - expected).abs().max() / expected.abs().max().clamp_min(_UNDERFLOW))
    if not distance <= allowed:
        _refuse(place, f"{what} is {distance:.2g} of the largest value off")


def _refuse(place: Path, reason: str) -> NoReturn:
    raise LRQuantError(
        f"checkpoint {place}: read back, {reason}, so it is not what was measured; nothing is put "
        "in place: export it again, or use another --format"
    )
