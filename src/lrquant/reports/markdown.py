"""report.md: the numbers of a run for a terminal, an issue or a model card."""

from __future__ import annotations

from lrquant.measures.rows import Table, table
from lrquant.reports.fitting import fitting_table
from lrquant.reports.result_sections import adaptation_table, result_tables
from lrquant.reports.sections import (
    block_table,
    expert_table,
    facts,
    linear_table,
    tower_tables,
    worst_sentence,
    worst_table,
)
from lrquant.reports.values import Contents


def run_markdown(contents: Contents) -> str:
    """The whole report, without pictures."""
    run = contents["run"]
    paragraphs = [f"# {_text(run['name'])}, {run['scheme']}, {run['method_name']}"]
    paragraphs += ["\n".join(f"- {_text(line)}" for line in contents["first"])] * bool(
        contents["first"]
    )
    if contents["warnings"]:
        lines = [f"- {_text(line)}" for line in contents["warnings"]]
        paragraphs.append("\n".join(["## To be looked at", "", *lines]))
    paragraphs += _examples(contents)
    paragraphs.append("## The run")
    paragraphs.append("\n".join(f"- {label}: {_text(value)}" for label, value in facts(run)))
    note = "" if run["repeatable"] else " (with the token ids that were given from Python)"
    commands = "\n\n".join([run["command"], *run["later_commands"]])
    paragraphs.append(f"Repeat it{note}:\n\n```\n{commands}\n```")
    if contents["missing"]:
        lines = [f"- {_text(line)}" for line in contents["missing"]]
        paragraphs.append("\n".join(["## Not in this report", "", *lines]))
    shown = [
        fitting_table(contents["fits"]),
        *result_tables([contents], [""]),
        adaptation_table(contents),
    ]
    shown += [worst_table(contents["worst_linears"])]
    blocks = contents["blocks"]
    shown += [block_table(blocks), linear_table(blocks), expert_table(blocks)]
    shown += tower_tables(contents["tower_blocks"])
    paragraphs += [_section(each) for each in shown if each.rows]
    paragraphs += filter(None, [worst_sentence(contents["worst_blocks"], contents["blocks"])])
    return "\n\n".join(paragraphs) + "\n"


def _examples(contents: Contents) -> list[str]:
    """What the model writes before and after."""
    if not contents["run"]["examples"]:
        return []
    method = contents["run"]["method_name"]
    lines = [
        f"- {_text(each['prompt'])} …\n  - full precision: {_text(each['full_precision'])}\n"
        f"  - {method}: {_text(each['quantized'])}"
        for each in contents["run"]["examples"]
    ]
    return ["\n".join(["## What it writes", "", *lines])]


def _section(shown: Table) -> str:
    rows = [[_text(cell) for cell in row] for row in shown.rows]
    text = f"## {shown.title}\n\n{table([_text(cell) for cell in shown.head], rows)}"
    return f"{text}\n\n{shown.note}" if shown.note else text


def _text(value: str) -> str:
    """Text that neither ends a cell nor is taken for markup."""
    for character in "\\`*_[]<>|":
        value = value.replace(character, "\\" + character)
    return " ".join(value.split())
