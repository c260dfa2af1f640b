"""What a run measured, beside what it measured before and what another model reaches.

`results.json` says under what conditions its last command measured (`CONDITIONS`), and has one
entry for each text, task or set (`MEASURES`).  Measures stand in one entry only if they are of the
same items under the same conditions.  Those of a set's other items, or under other conditions, are
kept in `others`: {kind: {name: [entry, …]}}, and an entry says in `measured_with` which of its
conditions are not those of the last command.  `learned_with` is under which a run was learned.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Entry = dict[str, Any]
MEASURES = (
    *("perplexity", "agreement", "test_time_adaptation", "tasks", "task_means"),
    *("vqa", "classification"),
)
CONDITIONS = ("model", "scheme", "method", "seed", "precision", "device", "threads", "cpu")
_PACKAGES = ("lrquant", "torch", "transformers")
_OF_WHAT = ("text", "sha256", "data", "items", "num_fewshot", "tasks")
_ONCE_SAID = ("base_model", "adapted", "reference_precision")  # of what one of the columns is
_OF_THE_RUN = ("learned_with", "max_drop")  # said once, and kept
_JOINED = ("differences", "acc", "acc_norm")


def merge_results(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`new`, and all that was measured before: beside it, or apart where it is something else."""
    before, now = conditions(old), conditions(new)
    merged = {name: value for name, value in new.items() if name not in (*MEASURES, "others")}
    merged = {name: old[name] for name in _OF_THE_RUN if name in old} | merged
    others: dict[str, dict[str, list[Entry]]] = {}
    for kind in MEASURES:
        kept: dict[str, list[Entry]] = {}
        for name, entry in entries(new, kind):
            kept.setdefault(name, []).append(entry)
        for name, entry in entries(old, kind):
            _put(kept.setdefault(name, []), _under(entry, before, now))
        first = {name: rows[0] for name, rows in kept.items()}
        rest = {name: rows[1:] for name, rows in kept.items() if rows[1:]}
        merged |= {kind: first[""] if kind == "classification" else first} if first else {}
        others |= {kind: rest} if rest else {}
    return merged | ({"others": others} if others else {})


def seen_from(results: dict[str, Any], precision: str) -> dict[str, Any]:
    """`results` whose entries say what is not as it was when the run was learned.

    Runs of earlier versions say only in which `precision` they were learned.
    """
    learned = results.get("learned_with") or {"precision": precision}
    versions = {name: learned[name] for name in _PACKAGES if name in learned}
    top = {name: learned[name] for name in CONDITIONS if name in learned}
    measures = (*MEASURES, "others")
    about = {name: value for name, value in results.items() if name not in measures}
    versions = {"versions": {**results.get("versions", {}), **versions}}
    return merge_results(results, about | top | (versions if "versions" in results else {}))


def entries(results: dict[str, Any], kind: str) -> Iterator[tuple[str, Entry]]:
    """(name, entry) of all measures of a kind, those in `others` after the one of the same name.

    A classifier has one set, of no name.
    """
    first = results.get(kind) or {}
    if kind == "classification":
        first = {"": first} if first else {}
    rest = (results.get("others") or {}).get(kind) or {}
    for name in dict.fromkeys([*first, *rest]):
        if name in first:
            yield name, first[name]
        for entry in rest.get(name, ()):
            yield name, entry


def conditions(results: dict[str, Any]) -> dict[str, Any]:
    """What measures of `results` have in common, in one level."""
    versions = results.get("versions") or {}
    common = {name: results[name] for name in CONDITIONS if name in results}
    return common | {name: versions[name] for name in _PACKAGES if name in versions}


def _under(entry: Entry, before: dict[str, Any], now: dict[str, Any]) -> Entry:
    """`entry` of a file that says `before`, for one that says `now`."""
    own = before | entry.get("measured_with", {})
    other = {name: value for name, value in own.items() if name in now and now[name] != value}
    plain = {name: value for name, value in entry.items() if name != "measured_with"}
    return plain | ({"measured_with": other} if other else {})


def _put(rows: list[Entry], old: Entry) -> None:
    """Add an older entry to newer ones: into the one that it goes with, or as one more."""
    for index, row in enumerate(rows):
        if _alike(row, old):
            rows[index] = _joined(old, row)
            return
    rows.append(old)


def _alike(one: Entry, other: Entry) -> bool:
    """Whether both are of the same items under the same conditions."""
    same = all(one.get(name) == other.get(name) for name in (*_OF_WHAT, "measured_with"))
    for part in ("acc", "acc_norm"):  # means say of which tasks they are
        if part in one and part in other:
            same = same and _alike(one[part], other[part])
    for name in _ONCE_SAID:
        same = same and (name not in one or name not in other or one[name] == other[name])
    standard = "full_precision"
    return same and one.get("reference", standard) == other.get("reference", standard)


def _joined(old: Entry, new: Entry) -> Entry:
    """Both, the newer value where both have one."""
    both = old | new
    for name in _JOINED:
        if name in old and name in new:
            both[name] = _joined(old[name], new[name])
    return both


def of_base(measured: dict[str, Any], name: str) -> dict[str, Any]:
    """`measured`, of which each entry that has a column or reference "base" says what that is."""
    marked = dict(measured)
    for kind in MEASURES:
        rows = {row: _marked(entry, name) for row, entry in entries(measured, kind)}
        if rows:
            marked[kind] = rows[""] if kind == "classification" else rows
    return marked


def _marked(entry: Entry, name: str) -> Entry:
    means = [entry[kind] for kind in ("acc", "acc_norm") if kind in entry]
    about_base = entry.get("reference") == "base" or any("base" in part for part in (entry, *means))
    return entry | {"base_model": name} if about_base else entry


def beside(results: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    """What one command has measured so far, with one more measure of it.

    The entry that was there first stays the first of its name: a base that reads a text as other
    tokens has an entry of its own in `others`.
    """
    about = {name: value for name, value in measured.items() if name not in (*MEASURES, "others")}
    return merge_results(measured, results) | about
