"""Inspection: a run folder or checkpoint in a few lines of text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.filesize import decimal

from lrquant.config.scheme import Scheme
from lrquant.errors import UNREADABLE, LRQuantError, nearest_beside
from lrquant.files.manifest import MANIFEST, read_manifest
from lrquant.files.whole import JsonObject, read_json
from lrquant.formats.verification import Verified, verify
from lrquant.measures.rows import table
from lrquant.measures.tables import results_table
from lrquant.model.sources.checks import first_line
from lrquant.runs.block_file import BlockRecord
from lrquant.runs.folder import RunFolder, is_run
from lrquant.runs.results import seen_from

_DEEP, _SHOWN = 3, 6  # words of a module's name, and modules that are named


def inspect_folder(path: Path) -> str:
    """Scheme, method, data, losses and sizes of a run; scheme and sizes of a checkpoint."""
    if is_run(path):
        return _inspect_run(RunFolder.open(path))
    if (path / "config.json").is_file():
        return _inspect_checkpoint(path)
    if not path.exists():
        raise LRQuantError(f"{path}: no such folder{nearest_beside(path)}")
    raise LRQuantError(f"{path}: neither a run folder (run.json) nor a checkpoint (config.json)")


def _inspect_run(folder: RunFolder) -> str:
    identity, config = folder.identity, folder.config
    records = folder.records()
    blocks = identity["model"]["blocks"]
    learned = sum(folder.block_path(r.block).stat().st_size for r in records)
    state = "finished" if len(records) == blocks else "not finished; go on with --resume"
    lines = [
        f"run {folder.path}: {len(records)} of {blocks} blocks, {state}",
        f"model: {config.model} ({identity['model']['model_type']})",
        f"scheme: {config.schemes.describe()}",
        f"learning: {_pairs(identity['method'])}; {_pairs(identity['learning'])}",
        f"calibration: {identity['calibration']}",
        f"precision: {identity['precision']}",
        f"learned parameters: {decimal(learned)}; "
        f"learning time: {sum(r.seconds for r in records):.0f} s; "
        "peak memory until the last block: "
        f"{decimal(max((r.peak_memory_bytes for r in records), default=0))}",
        "",
        _losses(records),
    ]
    tower = identity.get("tower")
    if tower is not None:
        records = folder.tower.records()
        scheme = Scheme(**tower["scheme"]).describe()
        lines += ["", f"vision tower: {len(records)} of {tower['blocks']} blocks; {scheme}", ""]
        lines.append(_losses(records))
    text = results_table(seen_from(folder.results(), identity["precision"]))
    lines += ["", text] if text else []
    return "\n".join(lines)


def _losses(records: Sequence[BlockRecord]) -> str:
    return table(
        ["block", "initial loss", "final loss", "learning", "seconds", "not finite"],
        [
            [
                str(r.block),
                f"{r.initial_loss:.6g}",
                f"{r.final_loss:.6g}",
                r.outcome or "-",
                f"{r.seconds:.1f}",
                "; ".join(r.non_finite) or "-",
            ]
            for r in records
        ],
    )


def _inspect_checkpoint(path: Path) -> str:
    config = read_json(path / "config.json")
    weights = sorted(path.glob("*.safetensors")) + sorted(path.glob("*.bin"))
    said = config.get("quantization_config") or {}
    if not isinstance(said, dict):
        raise LRQuantError(f"{path}/config.json: its quantization_config is no mapping; mend it")
    method = said.get("quant_method", "none (dense weights)")
    size = sum(file.stat().st_size for file in weights)
    head = [
        f"checkpoint {path}: {config.get('model_type')}, {len(weights)} files, {decimal(size)}",
        f"quantization: {method}",
    ]
    if not (path / MANIFEST).is_file():
        return "\n".join([*head, f"not verified: no {MANIFEST}, so not a checkpoint of lrquant"])
    facts, verified = read_manifest(path), verify(path)
    if verified.problems:
        count, first = len(verified.problems), "; ".join(verified.problems[:3])
        more = f", and {count - 3} more" if count > 3 else ""
        raise LRQuantError(
            f"{path}: {count} things are wrong ({first}{more}); export the run again"
        )
    try:
        return "\n".join([*head, *_of_manifest(facts, verified)])
    except UNREADABLE as error:
        raise LRQuantError(
            f"{path / MANIFEST}: not as it was written ({first_line(error)}); export the run again"
        ) from error


def _of_manifest(facts: JsonObject, verified: Verified) -> list[str]:
    share = verified.stored / verified.as_bf16
    lines = [
        f"scheme: {facts['scheme']}",
        *([f"vision tower: {facts['tower']}"] if facts.get("tower") else []),
        f"learned as: {facts['method']}, from {facts['base_model']}",
        f"calibration: {facts['calibration']['text']}",
        f"bits per weight of the linears, scales and zero points counted: "
        f"{verified.bits_per_weight:.3f}",
        f"tensors: {decimal(verified.stored)}, {share:.1%} of {decimal(verified.as_bf16)} in "
        f"bfloat16: {16 * share:.3f} bits a weight of the whole model, embedding and head included",
        *_carried(facts.get("extra_tensors", [])),
        f"verified: hashes of {len(facts['files'])} files; names, shapes, dtypes and values of all "
        "tensors",
    ]
    text = results_table(facts["results"])
    return lines + (["", text] if text else [])


def _carried(names: Sequence[str]) -> list[str]:
    """Tensors of the base model that transformers makes nothing of, by the modules they are of."""
    if not names:
        return []
    modules = list(dict.fromkeys(".".join(name.split(".")[:_DEEP]) for name in names))
    more = f" and {len(modules) - _SHOWN} more" if len(modules) > _SHOWN else ""
    return [
        f"carried unchanged, as transformers makes nothing of them: {len(names)} tensors of "
        f"{', '.join(modules[:_SHOWN])}{more}"
    ]


def _pairs(values: dict[str, object]) -> str:
    return ", ".join(
        f"{name} {'+'.join(value) if isinstance(value, list) else value}"
        for name, value in values.items()
    )
