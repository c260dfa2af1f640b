"""report.md: the numbers of a run for a terminal, an issue or a model card."""

from __future__ import annotations

from typing import Any

from lrquant.measures.tables import table
from lrquant.report.result_sections import adaptation_table, result_tables
from lrquant.report.sections import (
    Table,
    block_table,
    facts,
    linear_table,
    tower_tables,
    worst_sentence,
    worst_table,
)


def run_markdown(contents: dict[str, Any]) -> str:
    """The whole report, without pictures."""
    run = contents["run"]
    parts = [f"# {_text(run['name'])}, {run['scheme']}, {run['method_name']}"]
    parts.append("\n".join(f"- {label}: {_text(value)}" for label, value in facts(run)))
    note = "" if run["repeatable"] else " (with the token ids that were given from Python)"
    parts.append(f"Repeat it{note}:\n\n```\n{run['command']}\n```")
    if contents["missing"]:
        lines = [f"- {_text(line)}" for line in contents["missing"]]
        parts.append("\n".join(["## Not in this report", "", *lines]))
    shown = [*result_tables([contents], [""]), adaptation_table(contents)]
    shown += [worst_table(contents), block_table(contents), linear_table(contents)]
    shown += tower_tables(contents)
    parts += [_section(each) for each in shown if each.rows]
    parts += filter(None, [worst_sentence(contents)])
    return "\n\n".join(parts) + "\n"


def _section(shown: Table) -> str:
    rows = [[_text(cell) for cell in row] for row in shown.rows]
    text = f"## {shown.title}\n\n{table([_text(cell) for cell in shown.head], rows)}"
    return f"{text}\n\n{shown.note}" if shown.note else text


def _text(value: str) -> str:
    """Text that neither ends a cell nor is taken for markup."""
    for character in "\\`*_[]<>|":
        value = value.replace(character, "\\" + character)
    return " ".join(value.split())
