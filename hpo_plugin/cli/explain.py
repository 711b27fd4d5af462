"""``hpo-plugin explain``: what the rules behind a task's labels say about a given case."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from hpo_plugin.tasks.telelogs import Case, Diagnosis

app = typer.Typer(no_args_is_help=True, help="Explain the answer of a case.")


@app.callback()
def _explain() -> None:
    """Explain the answer of a case."""


@app.command()
def telelogs(
    file: Annotated[
        str,
        typer.Argument(
            help="A prompt as text (- for standard input), or a .parquet/.json/.jsonl/.csv file of questions, such as "
            "one that `hpo-plugin prepare telelogs` wrote."
        ),
    ],
    row: Annotated[int, typer.Option(min=0, help="Which row of a file of questions, from 0.")] = 0,
    text: Annotated[bool, typer.Option("--text", help="Print the chain of thought instead of the table.")] = False,
) -> None:
    """Diagnose a TeleLogs case with the rules behind the labels, and show the evidence.

    Exit status 0 with a diagnosis, 1 if no rule fits any option or the prompt does not parse.
    """
    from rich.console import Console

    from hpo_plugin.cli._errors import stopped
    from hpo_plugin.tasks.telelogs import chain_of_thought, diagnose, parse_prompt

    try:
        prompt, answer = _read(file, row)
        case = parse_prompt(prompt)
    except (ValueError, OSError) as error:
        raise stopped(error) from None
    diagnosis = diagnose(case)
    console = Console(highlight=False)
    if diagnosis.label is None or diagnosis.cause is None:
        console.print(_table(case, diagnosis))
        console.print("No rule holds for any of the options.", style="bold red")
        raise typer.Exit(1)
    if text:
        console.print(chain_of_thought(case, diagnosis), markup=False, soft_wrap=True)
        return
    console.print(_table(case, diagnosis))
    console.print()
    console.print(f"{diagnosis.label}: {diagnosis.cause.text}", style="bold", markup=False)
    for line in _evidence(case, diagnosis):
        console.print(f"  {line}", markup=False, soft_wrap=True)
    if answer is not None and answer != diagnosis.label:
        console.print(f"The file's answer is {answer}; the rules do not agree.", style="yellow", markup=False)


def _read(file: str, row: int) -> tuple[str, str | None]:
    """Return a prompt and, where the file knows it, the answer."""
    from hpo_plugin.tasks._sources import FILE_SUFFIXES, read_file

    if file == "-":
        return sys.stdin.read(), None
    path = Path(file)
    if path.suffix.lower() not in FILE_SUFFIXES:
        # Line breaks of every kind become "\n", as they do on standard input.
        return path.read_text(encoding="utf-8-sig"), None
    rows = read_file(path)
    if row >= len(rows):
        raise ValueError(f"--row {row}: {path} has {len(rows)} rows, counted from 0")
    entry = rows[row] if isinstance(rows[row], dict) else {}
    columns = {str(name).strip().lower(): value for name, value in entry.items()}
    if isinstance(columns.get("prompt"), list):
        # A file in verl's format.
        return str(columns["prompt"][-1]["content"]), str((columns.get("reward_model") or {}).get("ground_truth"))
    if columns.get("question") is None:
        raise ValueError(f"{path}, row {row}: no column 'question' or 'prompt' among {', '.join(columns) or 'none'}")
    answer = columns.get("answer")
    return str(columns["question"]), None if answer is None else str(answer).strip()


def _table(case: Case, diagnosis: Diagnosis) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("", "rule", "what it found", "rows"):
        table.add_column(column, overflow="fold")
    for finding in diagnosis.findings:
        label = case.label_of(finding.cause)
        decided = finding is diagnosis.evidence
        rows = ", ".join(str(number + 1) for number in finding.rows) if finding.holds else ""
        table.add_row(
            label or "not on offer",
            finding.rule,
            finding.sentence(),
            rows,
            style="bold" if decided else None if label else "dim",
        )
    return table


def _evidence(case: Case, diagnosis: Diagnosis) -> list[str]:
    """The rows and cells that decided, as the prompt has them."""
    from dataclasses import replace

    from hpo_plugin.tasks.telelogs.prompts import table_lines

    evidence = diagnosis.evidence
    if evidence is None or not (evidence.rows or evidence.cells):
        return []
    shown = replace(
        case,
        drive_test=tuple(case.drive_test[number] for number in evidence.rows),
        cells=tuple(case.cells[index] for index in evidence.cells),
    )
    drive_test, cells = table_lines(shown)
    lines = [f"row {number + 1}: {line}" for number, line in zip(evidence.rows, drive_test[1:], strict=True)]
    return lines + [f"cell {cell.name}: {line}" for cell, line in zip(shown.cells, cells[1:], strict=True)]
