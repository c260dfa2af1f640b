"""README.md of a checkpoint: what it is, how good it is, how to load it."""

from __future__ import annotations

import json

from lrquant.config.core import TARGETS
from lrquant.config.schemes import Schemes
from lrquant.export.format import Format
from lrquant.export.targets import loading_of
from lrquant.files.whole import JsonObject
from lrquant.measures.rows import SPREAD_NOTE
from lrquant.measures.tables import measured_entries, results_table

_LOADING = {
    "vllm": "vLLM:\n\n```\nSERVE\n```",
    "vllm-cpu": "vLLM's CPU build:\n\n```\nSERVE\n```",
    "transformers": (
        "transformers:\n\n```python\nfrom transformers import CLASS\n\n"
        'model = CLASS.from_pretrained("FOLDER")\n```'
    ),
    "native": (
        "transformers with this package, whose import registers the format:\n\n```python\n"
        "import lrquant\nfrom transformers import CLASS\n\n"
        'model = CLASS.from_pretrained("FOLDER")\n```'
    ),
}
_NAMES = {
    "vllm": "vLLM",
    "vllm-cpu": "vLLM's CPU build",
    "transformers": "transformers alone",
    "native": "this package's runtime",
}
_PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForImageClassification": "image-classification",
}


def model_card(schemes: Schemes, seed: int, form: Format, facts: JsonObject) -> str:
    """A model card in Markdown, from the manifest's facts."""
    calibration = facts["calibration"]
    front = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {_PIPELINES[facts['auto_class']]}",
        f"base_model: {json.dumps(facts['base_model'])}",
        f"tags: [lrquant, {form.name}, {schemes.default.name.lower()}]",
        "---",
    ]
    paragraphs = [
        "\n".join(front),
        f"# {facts['base_model']}, {schemes.default.name}",
        f"Quantised after training with lrquant. Format: {form.name}.",
        "\n".join(
            [
                f"- Scheme: {facts['scheme']}",
                *([f"- Vision tower: {facts['tower']}"] if facts["tower"] else []),
                f"- Method: {facts['method']}",
                f"- Calibration: {calibration['text']}; SHA-256 of the tokens "
                f"`{calibration['sha256']}`",
                f"- Seed {seed}; matrix products in {facts['precision']}",
                *_base(facts["results"]),
            ]
        ),
        "## Quality",
        _quality(facts["results"]),
        "## Loading",
        *_loading(schemes, form, facts["auto_class"]),
        "Settings of the run: `lrquant.yaml`. Facts and the hash of each file: `lrquant.json`; "
        "`lrquant inspect FOLDER` compares them.",
    ]
    return "\n\n".join(paragraphs) + "\n"


def _base(results: JsonObject) -> list[str]:
    """That the base model's weights had been quantised before, if they had."""
    origin = results.get("unpacked_from")
    return [f"- Full precision: the base model as unpacked from {origin}"] if origin else []


def _quality(results: JsonObject) -> str:
    text = results_table(results)
    if not text:
        return "Not measured by the run that made it."
    sets = [entry["text"] for entry in measured_entries(results) if "text" in entry]
    windows = "; ".join(dict.fromkeys(map(str, sets)))
    notes = [f"Measured on: {windows}."] if windows else []
    notes += [SPREAD_NOTE] if "±" in text else []
    return "\n\n".join([text, *notes])


def _loading(schemes: Schemes, form: Format, auto_class: str) -> list[str]:
    """How each runtime that takes it loads it, what it then computes, and what it has to say."""
    ways = []
    for target in TARGETS:
        loading = loading_of(form, schemes, target)
        if loading.refusal is None:
            serve = loading.serve or "vllm serve FOLDER"
            way = _LOADING[target].replace("CLASS", auto_class).replace("SERVE", serve)
            notes = "".join(f" Note: {note}." for note in loading.notes)
            ways.append(f"{way}\n\nIt computes {loading.computes}.{notes}")
        else:
            ways.append(f"Not for {_NAMES[target]}: {loading.refusal}.")
    return ways
