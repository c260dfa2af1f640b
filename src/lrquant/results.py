"""What a run measured, beside what it measured before and what another model reaches."""

from __future__ import annotations

from typing import Any


def merge_results(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`new`, with what it did not measure kept of `old`."""
    measured = ("perplexity", "agreement", "test_time_adaptation", "tasks", "task_means")
    kept = {name: {**old.get(name, {}), **new.get(name, {})} for name in measured}
    kept |= _pictures_beside(old, new)
    return {**new, **{name: value for name, value in kept.items() if value}}


def beside(results: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    """`results` with another model's measures of the same texts put beside those that it has."""
    texts = {**results.get("perplexity", {})}
    for name, scores in measured.get("perplexity", {}).items():
        texts[name] = {**texts.get(name, {}), **scores}
    agreed = {**results.get("agreement", {}), **measured.get("agreement", {})}
    kept = {"perplexity": texts, "agreement": agreed, **_pictures_beside(results, measured)}
    return {**results, **measured, **{name: value for name, value in kept.items() if value}}


def _pictures_beside(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Measures on pictures, which come one model at a time: beside those of the same pictures."""
    questions = {**old.get("vqa", {})}
    for name, scores in new.get("vqa", {}).items():
        questions[name] = _same_text(questions.get(name, {}), scores)
    classes = _same_text(old.get("classification", {}), new.get("classification", {}))
    return {"vqa": questions, "classification": classes}


def _same_text(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    same = not new or old.get("text") == new.get("text")
    return {**old, **new} if same else new
