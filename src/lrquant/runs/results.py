"""Results of a run, beside what it measured before and what another model reaches.

`results.json` says under what conditions its last command measured (`CONDITIONS`), and has one
entry for each text, task or set of each kind of measure (`kinds`).  Measures stand in one entry
only if they are of the same items under the same conditions.  Those of a set's other items, or
under other conditions, are kept in `others`: {kind: {name: [entry, …]}}, and an entry says in
`measured_with` which of its conditions are not those of the last command.  `learned_with` is under
which a run was learned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
Entry: TypeAlias = Mapping[str, Json]
Results: TypeAlias = Mapping[str, Json]

CONDITIONS = ("model", "scheme", "method", "seed", "precision", "device", "threads", "cpu", "gpu")
_PACKAGES = ("lrquant", "torch", "transformers")
_OF_WHAT = ("text", "sha256", "data", "items", "num_fewshot", "tasks")
_ONCE_SAID = ("base_model", "adapted", "reference_precision")  # of what one of the columns is
VERDICT = "max_drop"  # of the last command that asked for one
ASKED = "asked"  # what later commands asked to measure, settings by name, each once
_OF_THE_RUN = ("learned_with", VERDICT, "sizes", "examples")  # said once, and kept


def record(value: Json) -> Entry:
    """A JSON object; nothing where the value is none."""
    return value if isinstance(value, Mapping) else {}


def objects(value: Json) -> list[Entry]:
    """A list of JSON objects; empty where the value is none."""
    return [record(each) for each in value] if isinstance(value, list) else []


def figure(value: Json) -> float | str | None:
    """A number, or the word for one that JSON does not have; None where the value is neither."""
    if isinstance(value, bool):
        return None
    return value if isinstance(value, int | float | str) else None


def kinds(results: Results) -> list[str]:
    """The kinds of measures that `results` have, by their shape: whoever declared them.

    A kind has entries by name, or is one entry (`_is_entry`): all else is said of the command.
    """
    named = [name for name, value in results.items() if name != "others" and _is_kind(value)]
    return list(dict.fromkeys([*named, *record(results.get("others"))]))


def _is_kind(value: Json) -> bool:
    inside = record(value)
    if not inside:
        return False
    return _is_entry(inside) or all(isinstance(entry, Mapping) for entry in inside.values())


def _is_entry(value: Entry) -> bool:
    """Whether it is an entry itself: of the one set of a kind, which has no name."""
    return isinstance(value.get("text"), str)


def merge_results(old: Results, new: Results) -> dict[str, Json]:
    """`new`, and all that was measured before: beside it, or apart where it is something else."""
    before, now = conditions(old), conditions(new)
    merged = {name: old[name] for name in _OF_THE_RUN if name in old} | _about(new)
    asked = [each for results in (old, new) for each in objects(results.get(ASKED))]
    if asked:
        merged[ASKED] = [each for i, each in enumerate(asked) if each not in asked[:i]]
    others: dict[str, Json] = {}
    for kind in dict.fromkeys([*kinds(new), *kinds(old)]):
        kept: dict[str, list[Entry]] = {}
        for name, entry in entries(new, kind):
            kept.setdefault(name, []).append(entry)
        for name, entry in entries(old, kind):
            _put(kept.setdefault(name, []), _under(entry, before, now))
        merged[kind] = named_entries({name: rows[0] for name, rows in kept.items()})
        rest = {name: rows[1:] for name, rows in kept.items() if rows[1:]}
        others |= {kind: rest} if rest else {}
    return merged | ({"others": others} if others else {})


def _about(results: Results) -> dict[str, Json]:
    """What `results` say that is no measure."""
    measured = {*kinds(results), "others"}
    return {name: value for name, value in results.items() if name not in measured}


def seen_from(results: Results, precision: str) -> dict[str, Json]:
    """`results` whose entries say what is not as it was when the run was learned.

    Runs of earlier versions say only in which `precision` they were learned.
    """
    learned = record(results.get("learned_with")) or {"precision": precision}
    versions = {name: learned[name] for name in _PACKAGES if name in learned}
    top = {name: learned[name] for name in CONDITIONS if name in learned}
    told = {"versions": {**record(results.get("versions")), **versions}}
    return merge_results(results, _about(results) | top | (told if "versions" in results else {}))


def entries(results: Results, kind: str) -> Iterator[tuple[str, Entry]]:
    """(name, entry) of all measures of a kind, those in `others` after the one of the same name.

    The name is empty where a kind has one set, of no name.
    """
    first = record(results.get(kind))
    if first and _is_entry(first):
        first = {"": first}
    rest = record(record(results.get("others")).get(kind))
    for name in dict.fromkeys([*first, *rest]):
        if name in first:
            yield name, record(first[name])
        more = rest.get(name)
        for entry in more if isinstance(more, Sequence) else ():
            yield name, record(entry)


def named_entries(rows: Mapping[str, Entry]) -> Entry:
    """Entries by name as a kind has them: the one of no name alone."""
    return rows.get("", rows)


def conditions(results: Results) -> dict[str, Json]:
    """What measures of `results` have in common, in one level."""
    versions = record(results.get("versions"))
    common = {name: results[name] for name in CONDITIONS if name in results}
    return common | {name: versions[name] for name in _PACKAGES if name in versions}


def _under(entry: Entry, before: Entry, now: Entry) -> Entry:
    """`entry` of a file that says `before`, for one that says `now`."""
    own = {**before, **record(entry.get("measured_with"))}
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
    for name in _inner(one).keys() & _inner(other).keys():
        same = same and _alike(_inner(one)[name], _inner(other)[name])
    for name in _ONCE_SAID:
        same = same and (name not in one or name not in other or one[name] == other[name])
    standard = "full_precision"
    return same and one.get("reference", standard) == other.get("reference", standard)


def _joined(old: Entry, new: Entry) -> Entry:
    """Both, the newer value where both have one."""
    both = {**old, **new}
    for name in (*_inner(old), "differences"):
        if name in old and name in new:
            both[name] = _joined(record(old[name]), record(new[name]))
    return both


def _inner(entry: Entry) -> dict[str, Entry]:
    """What of an entry says itself of what it is, as each mean does of which tasks."""
    inside = {name: record(value) for name, value in entry.items()}
    return {name: each for name, each in inside.items() if each.keys() & {*_OF_WHAT}}


def of_base(measured: Results, name: str) -> dict[str, Json]:
    """`measured`, of which each entry that has a column or reference "base" says what that is."""
    marked = dict(measured)
    for kind in kinds(measured):
        rows = {row: _marked(entry, name) for row, entry in entries(measured, kind)}
        marked[kind] = named_entries(rows)
    return marked


def _marked(entry: Entry, name: str) -> Entry:
    inside = (entry, *_inner(entry).values())
    about_base = entry.get("reference") == "base" or any("base" in each for each in inside)
    return {**entry, "base_model": name} if about_base else entry


def beside(results: Results, measured: Results) -> dict[str, Json]:
    """What one command has measured so far, with one more measure of it.

    The entry that was there first stays the first of its name: a base that reads a text as other
    tokens has an entry of its own in `others`.
    """
    return merge_results(measured, results) | _about(measured)
