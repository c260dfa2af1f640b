"""All numbers of a report, gathered from a run folder as JSON has them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lrquant.blocks.plan import Plan
from lrquant.config.config import ingredient_kinds
from lrquant.config.groups import Learning
from lrquant.config.scheme import Scheme
from lrquant.files.whole import JsonObject
from lrquant.ingredients.ingredient import Ingredient
from lrquant.learn.identity import describe_method, method_name
from lrquant.measures.choice import measures
from lrquant.measures.tables import kinds_in_order
from lrquant.reports.decision import first_sentences, warnings
from lrquant.reports.fitting import fitting
from lrquant.reports.repeat import measuring_commands, repeating_command, settings_said
from lrquant.reports.values import spans_of
from lrquant.runs.folder import BlockRecord, RunFolder
from lrquant.runs.results import VERDICT, objects, record, seen_from
from lrquant.version import __version__

FORMAT = 1
QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)
_WORST = 10
_EXPERT = re.compile(r"\.experts\.\d+\.")


def run_contents(folder: RunFolder) -> JsonObject:
    """What report.json holds: run, results, blocks, the worst of them, what fits, what is missing,
    and the first lines and warnings of the page.

    Figures of a block are those of `BlockDiagnostics`, None where they were not taken; its
    parameters are quantiles (`QUANTILES`) over all values, nothing left out.
    """
    records = folder.records()
    results = seen_from(folder.results(), folder.identity["precision"])
    blocks = [_block(folder, record) for record in records]
    kept = (*kinds_in_order(results), "others", VERDICT)
    measured = {name: results[name] for name in kept if results.get(name)}
    contents = {
        "format": FORMAT,
        "written_by": f"lrquant {__version__}",
        "run": _run(folder, records, results),
        # as words, "inf" and "nan": nobody should miss them
        "results": without_non_finite(measured, str),
        "blocks": blocks,
        "tower_blocks": [_block(folder.tower, record) for record in folder.tower.records()],
        "worst_linears": _worst_linears(blocks),
        "worst_blocks": _worst_blocks(blocks),
    }
    plan, config = Plan.of(folder.config.quantizing), folder.config
    contents["fits"] = fitting(plan, config.format, config.target, contents["run"]["sizes"])
    contents["missing"] = _missing(contents)
    contents["first"] = first_sentences(contents)
    contents["warnings"] = warnings(contents)
    return without_non_finite(contents, lambda _: None)


def _run(folder: RunFolder, records: list[BlockRecord], results: JsonObject) -> JsonObject:
    identity, config = folder.identity, folder.config
    schemes = config.schemes.of_language
    plan, learning = Plan.of(config.quantizing), config.group(Learning)
    return {
        "folder": folder.path.resolve().name,
        "name": config.net_name,
        "model": config.model,
        "model_type": identity["model"]["model_type"],
        "weights": identity["model"]["weights"],
        "blocks": identity["model"]["blocks"],
        "learned_blocks": len(records),
        "scheme": schemes.name,
        "scheme_in_words": schemes.describe(),
        "activations_quantised": not schemes.weight_only,
        "tower": Scheme(**identity["tower"]["scheme"]).describe() if "tower" in identity else "",
        "method": results.get("method", describe_method(plan, learning)),
        "method_name": results.get("method_name", method_name(plan, learning)),
        "calibration": identity["calibration"],
        "data": identity["data"],
        "statistics": identity["statistics"],
        "seed": config.seed,
        "precision": identity["precision"],
        "device": results.get("device"),
        "threads": results.get("threads"),
        "cpu": results.get("cpu"),
        "gpu": results.get("gpu"),
        "unpacked_from": results.get("unpacked_from", ""),
        "versions": results.get("versions", {}),
        "seconds": sum(record.seconds for record in records),
        "peak_memory_bytes": max((record.peak_memory_bytes for record in records), default=0),
        "parameter_bytes": sum(folder.block_path(r.block).stat().st_size for r in records),
        "sizes": record(results.get("sizes")),
        "examples": objects(results.get("examples")),
        "calibrated_on": config.calib_dataset.split(","),
        "settings": settings_said(config),
        "command": repeating_command(config),
        "later_commands": measuring_commands(config, results),
        "repeatable": identity["data"]["set"] != "given/given",
    }


def _block(folder: RunFolder, record: BlockRecord) -> JsonObject:
    diagnosed = folder.load_diagnostics(record.block)
    return {
        **vars(record),
        "figures": None if diagnosed is None else diagnosed[0],
        "parameters": _parameters(folder.learned(record.block)),
    }


def _parameters(parameters: dict[str, Tensor]) -> dict[str, dict[str, list[float]]]:
    """Quantiles by chart and by the site or matrix that owns them, as their ingredient shows them.

    Of a matrix, all parameters of one chart count as one set, and so do those of the experts of a
    module, hundreds of which no page could show.
    """
    learned = {kind.name: kind for kind in ingredient_kinds() if issubclass(kind, Ingredient)}
    values: dict[str, dict[str, list[Tensor]]] = {}
    for name, tensor in parameters.items():
        prefix, _, rest = name.partition(".")
        owner, _, parameter = rest.rpartition(".")
        owner = _EXPERT.sub(".experts.*.", owner)
        kind, tensor = learned[prefix].shown(parameter, tensor)
        values.setdefault(kind, {}).setdefault(owner, []).append(tensor.flatten())
    return {
        kind: {owner: quantiles(torch.cat(own)) for owner, own in owners.items()}
        for kind, owners in values.items()
    }


def quantiles(values: Tensor) -> list[float]:
    """The values nearest to the ranks `QUANTILES` of a flat tensor of any size."""
    ordered = values.float().sort().values
    return [float(ordered[round(share * (len(ordered) - 1))]) for share in QUANTILES]


def _worst_linears(blocks: list[JsonObject]) -> list[JsonObject]:
    """The linears that add most error themselves."""
    entries = [
        {
            "block": block["block"],
            "linear": linear,
            "own_snr": snr["own_snr"]["learned"],
            "own_snr_round_to_nearest": snr["own_snr"]["round_to_nearest"],
            "snr": snr["snr"]["learned"],
        }
        for block in blocks
        if block["figures"]
        for linear, snr in block["figures"]["linears"].items()
        if snr["own_snr"]["learned"] is not None
    ]
    return sorted(entries, key=lambda entry: entry["own_snr"])[:_WORST]


def _worst_blocks(blocks: list[JsonObject]) -> list[JsonObject]:
    """The blocks that add most error to their output."""
    entries = [
        {"block": block["block"], "error_made": block["figures"]["error_made"]["learned"]}
        for block in blocks
        if block["figures"] and block["figures"]["error_made"]["learned"] is not None
    ]
    return sorted(entries, key=lambda entry: -entry["error_made"])[:3]


def _missing(contents: JsonObject) -> list[str]:
    """What the report could show and this run does not have, with what brings it."""
    run, results, blocks = contents["run"], contents["results"], contents["blocks"]
    missing = []
    if run["learned_blocks"] < run["blocks"]:
        missing.append(
            f"blocks {run['learned_blocks']} to {run['blocks'] - 1}: the run is not finished; go "
            "on with lrquant quantize --resume"
        )
    bare = [block["block"] for block in blocks if block["figures"] is None]
    if bare:
        missing.append(
            f"errors, activations and histograms of {spans_of(bare)}: learned without the report's "
            "measurements (--no-report, or an earlier version); learn again to have them"
        )
    missing += [text for measure in measures() for text in measure.missing(results)]
    return missing


def without_non_finite(value: Any, instead: Callable[[float], str | None]) -> Any:
    """The same JSON value with each number that JSON does not have replaced."""
    if isinstance(value, dict):
        return {key: without_non_finite(inner, instead) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_non_finite(inner, instead) for inner in value]
    return instead(value) if isinstance(value, float) and not math.isfinite(value) else value
