"""What differs between the compared: what forbids a comparison, and which settings differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from lrquant.measures.rows import Table
from lrquant.reports.tradeoffs import model_of
from lrquant.reports.values import Contents
from lrquant.runs.results import record

_UNSAID = "–"


def differences(runs: Sequence[Contents], names: Sequence[str]) -> list[str]:
    """Why numbers of the compared must not simply be held against each other, a sentence each."""
    said = []
    if len({model_of(contents) for contents in runs}) > 1:
        models = _by_value(runs, names, lambda contents: str(contents["run"]["model"]))
        said.append(f"Different models: {models}. Each has its own full precision.")
    said += _texts(runs, names)
    for key, words in (("precision", "precisions"), ("device", "devices")):
        if len({contents["run"][key] for contents in runs if contents["run"].get(key)}) > 1:
            values = _by_value(runs, names, partial(_said, key))
            said.append(f"Measured in different {words}: {values}.")
    return said


def _said(key: str, contents: Contents) -> str:
    return str(contents["run"].get(key) or _UNSAID)


def _texts(runs: Sequence[Contents], names: Sequence[str]) -> Iterator[str]:
    """Texts of which not all have measured the same windows, or not all at all."""
    measured = [record(contents["results"].get("perplexity")) for contents in runs]
    texts = list(dict.fromkeys(text for own in measured for text in own))
    for text in texts:
        windows = [record(own.get(text)).get("sha256") for own in measured]
        if len({each for each in windows if each is not None}) > 1:
            yield f"Not the same windows of {text}: perplexities on it do not compare."
        lacking = [name for name, each in zip(names, windows, strict=True) if each is None]
        if lacking:
            yield f"{text} was not measured of {', '.join(lacking)}."


def _by_value(
    runs: Sequence[Contents], names: Sequence[str], value: Callable[[Contents], str]
) -> str:
    """value (a, b); other (c)."""
    groups: dict[str, list[str]] = {}
    for contents, name in zip(runs, names, strict=True):
        groups.setdefault(value(contents), []).append(name)
    return "; ".join(f"{key} ({', '.join(members)})" for key, members in groups.items())


def settings_that_differ(runs: Sequence[Contents], names: Sequence[str]) -> Table:
    """Settings in which the runs are not alike; "–" where one has the default."""
    shown = [
        (n, c["run"]["settings"]) for n, c in zip(names, runs, strict=True) if c["run"]["settings"]
    ]
    keys = list(dict.fromkeys(key for _, settings in shown for key in settings))
    rows = [[key, *(settings.get(key, _UNSAID) for _, settings in shown)] for key in keys]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    head = ["setting", *(name for name, _ in shown)]
    return Table("Settings that differ", head, rows, "– : the default.")
