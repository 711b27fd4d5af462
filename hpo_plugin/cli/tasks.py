"""``hpo-plugin prepare``, ``explain`` and ``score``, with one subcommand per task, built from the task's options."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from hpo_plugin.tasks.task import DataSet, Row, Task


def task_commands(help_text: str, build: Callable[[Task], Callable[..., None]]) -> typer.Typer:
    """Return a command group with one subcommand per task: a task of this package, or the path of a task's file.

    Args:
        help_text: Help of the group.
        build: Builds the command of a task, a function with typer's annotations.
    """

    class TaskGroup(TyperGroup):
        def list_commands(self, ctx: Any) -> list[str]:
            from hpo_plugin.tasks.task import TASK_NAMES

            return list(TASK_NAMES)

        def get_command(self, ctx: Any, cmd_name: str) -> Any:
            from hpo_plugin.tasks.task import TaskError, load_task

            try:
                task = load_task(cmd_name)
            except TaskError as error:
                raise typer.BadParameter(str(error), ctx=ctx, param_hint="TASK") from None
            one = typer.Typer(add_completion=False)
            one.command(name=cmd_name)(build(task))
            return typer.main.get_command(one)

    group = typer.Typer(no_args_is_help=True, help=help_text, cls=TaskGroup, subcommand_metavar="TASK [ARGS]...")

    @group.callback()
    def _group() -> None:
        pass

    return group


# --- prepare -------------------------------------------------------------------------------------------------------


def _prepare_command(task: Task) -> Callable[..., None]:
    hints = get_type_hints(task.Options)
    parameters = [
        inspect.Parameter(
            "output",
            inspect.Parameter.KEYWORD_ONLY,
            annotation=Annotated[Path, typer.Option(help="Directory for the parquet files and manifest.json.")],
        )
    ]
    for field in dataclasses.fields(task.Options):
        kind = hints[field.name]
        # typer takes lists for options that may be repeated.
        kind = list[int] | None if kind in (tuple[int, ...] | None, tuple[int, ...]) else kind
        if field.name in ("output", "force"):
            raise typer.BadParameter(
                f"the option {field.name} of the task {task.name} has the same name as the option --{field.name} of "
                "`hpo-plugin prepare`. Rename the option of the task."
            )
        # Without an explicit flag, typer would add --no-… to a switch.
        flag = field.metadata.get("flag") or (f"--{field.name.replace('_', '-')}" if field.default is False else "")
        option = typer.Option(
            *([flag] if flag else []), help=field.metadata.get("help", ""), min=field.metadata.get("minimum")
        )
        parameters.append(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=Annotated[kind, option],
            )
        )
    parameters.append(
        inspect.Parameter(
            "force",
            inspect.Parameter.KEYWORD_ONLY,
            default=False,
            annotation=Annotated[bool, typer.Option("--force", help="Overwrite files with other content.")],
        )
    )

    def prepare(output: Path, force: bool, **given: Any) -> None:
        from hpo_plugin.console import stage_bars, stopped, terminal

        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in given.items()
        }
        try:
            options = task.Options(**values)
            task.validate(options)
            with stage_bars(terminal(stderr=True), transient=False) as progress:
                made = task.prepare(output, options, force=force, progress=progress)
        except (ValueError, OSError) as error:
            raise stopped(error) from None
        _print_data_set(made)

    prepare.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    prepare.__annotations__ = {}
    prepare.__doc__ = (
        f"Write a training and a test split of {task.title} in verl's parquet format.\n\n"
        "The same options give the same bytes. The command does not overwrite\n"
        "files with other content without --force."
    )
    return prepare


def _print_data_set(made: DataSet) -> None:
    from rich.table import Table

    from hpo_plugin.console import terminal

    counts = dict(made.manifest["counts"])
    for split, agreement in made.manifest.get("oracle", {}).items():
        rows = sum(sum(found.values()) for found in agreement.values())
        agreed = sum(found.get(cause, 0) for cause, found in agreement.items())
        counts[f"{split}: the rules agree with the label"] = f"{agreed:,} of {rows:,} ({100 * agreed / rows:.1f} %)"
    leakage = made.manifest.get("leakage")
    if leakage:
        counts["base scenarios, train and test"] = f"{leakage['train_scenarios']:,} and {leakage['test_scenarios']:,}"
        counts["in both"] = f"{leakage['shared_scenarios']:,}"
    directory, written = made.publication.directory, made.publication.written
    table = Table(show_header=False, box=None, pad_edge=False)
    for row in _count_rows(counts):
        table.add_row(*row)
    for name in sorted({*written, *made.publication.unchanged} - {"manifest.json"}):
        table.add_row(str(directory / name), "written" if name in written else "already exists, identical")
    console = terminal()
    console.print(table, soft_wrap=True)
    for name, examples in counts.items():
        if name.endswith("_examples"):
            for example in examples:
                console.print(f"{name.removesuffix('_examples')}: {example}", highlight=False)
    if leakage and leakage["shared_scenarios"]:
        terminal(stderr=True).print(
            f"warning: {leakage['train_rows']:,} training rows and {leakage['test_rows']:,} test rows share a base "
            "scenario, so the held-out success will be too high",
            style="yellow",
            highlight=False,
            soft_wrap=True,
        )


def _count_rows(counts: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for name, value in counts.items():
        label = name.replace("_", " ")
        if isinstance(value, int):
            yield label, f"{value:,}"
        elif isinstance(value, str):
            yield label, value
        elif isinstance(value, Mapping):
            for kind, count in value.items():
                yield f"{label}: {kind}", f"{count:,}"


# --- explain -------------------------------------------------------------------------------------------------------


def _explain_command(task: Task) -> Callable[..., None]:
    def explain(
        file: Annotated[
            str,
            typer.Argument(
                help="File with a prompt as text (- for standard input), or .parquet, .json, .jsonl or .csv file of "
                "rows, for example from `hpo-plugin prepare`."
            ),
        ],
        row: Annotated[int, typer.Option(min=0, help="Index of the row in the file, from 0.")] = 0,
        text: Annotated[bool, typer.Option("--text", help="Print the derivation instead of the table.")] = False,
    ) -> None:
        from hpo_plugin.console import stopped, terminal

        try:
            given = _read_row(task, file, row)
            found = task.explain(given)
        except (ValueError, OSError) as error:
            raise stopped(error) from None
        console = terminal(highlight=False)
        if text and found.answer is not None:
            console.print(found.text or found.summary, soft_wrap=True)
            return
        if found.table is not None:
            console.print(found.table)
            console.print()
        console.print(found.summary, style="bold red" if found.answer is None else "bold")
        if found.answer is None:
            raise typer.Exit(1)
        for line in found.evidence:
            console.print(f"  {line}", soft_wrap=True)
        truth = given["reward_model"].get("ground_truth")
        if isinstance(truth, str) and truth != found.answer:
            console.print(f"The answer in the file is {truth}; the rules disagree.", style="yellow")

    explain.__doc__ = (
        f"Explain the answer to one row of {task.title}.\n\n"
        "Exit status 0: there is an answer; 1: there is none, or the row cannot be read."
    )
    # typer cannot resolve the names in the annotations, which are local to this function.
    explain.__annotations__ = get_type_hints(explain, globals(), include_extras=True)
    return explain


def _read_row(task: Task, file: str, number: int) -> Row:
    """Return a row from a file of rows, or a row with only a prompt."""
    from hpo_plugin.tasks.sources import FILE_SUFFIXES, read_file

    path = Path(file)
    if file == "-" or path.suffix.lower() not in FILE_SUFFIXES:
        # Line breaks of every kind become "\n", as they do on standard input.
        prompt = sys.stdin.read() if file == "-" else path.read_text(encoding="utf-8-sig")
        return {"prompt": [{"role": "user", "content": prompt}], "reward_model": {"ground_truth": None}}
    rows = read_file(path)
    if number >= len(rows):
        raise ValueError(f"--row={number} does not exist: {path} has {len(rows)} rows, counted from 0")
    entry = rows[number] if isinstance(rows[number], dict) else {}
    try:
        return task.read_row({str(name).strip().lower(): value for name, value in entry.items()})
    except ValueError as error:
        raise ValueError(f"{path}, row {number}: {error}") from error


# --- score ---------------------------------------------------------------------------------------------------------


def _score_command(task: Task) -> Callable[..., None]:
    def score(
        file: Annotated[
            Path,
            typer.Argument(help="File <step>.jsonl of verl's trainer.validation_data_dir, with one sample per line."),
        ],
    ) -> None:
        from hpo_plugin.console import stopped, terminal

        try:
            prompts = _read_samples(file)
            metrics = task.metrics(prompts)
            groups = [task.group(truth) for truth, _ in prompts]
        except (ValueError, OSError) as error:
            raise stopped(error) from None
        console = terminal(highlight=False)
        console.print(f"{len(prompts):,} prompts, {len(prompts[0][1])} samples each")
        for name, value in metrics.items():
            console.print(f"{name:<8}{100 * value:.2f} %", style="bold")
        _print_groups(console, groups, prompts)

    score.__doc__ = (
        f"Print pass@1 of a validation of {task.title}, and maj@k if samples have an answer.\n\n"
        "k is the number of samples per prompt. verl's own maj@k is a bootstrap\n"
        "estimate; this command computes the majority itself."
    )
    score.__annotations__ = get_type_hints(score, globals(), include_extras=True)
    return score


def _print_groups(console: Any, groups: Sequence[str | None], prompts: Sequence[tuple[Any, list[Any]]]) -> None:
    from rich.table import Table

    from hpo_plugin.tasks.task import is_correct

    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("group", "samples", "correct", "most frequent answers"):
        table.add_column(column, justify="left" if column in ("group", "most frequent answers") else "right")
    for group in sorted({group for group in groups if group is not None}, key=_natural):
        samples = [
            sample for own, (_, all_of) in zip(groups, prompts, strict=True) if own == group for sample in all_of
        ]
        answers = Counter(str(sample["pred"]) for sample in samples if "pred" in sample)
        shown = "  ".join(f"{text or 'none'} {100 * n / len(samples):.0f} %" for text, n in answers.most_common(4))
        correct = sum(map(is_correct, samples))
        table.add_row(group, f"{len(samples):,}", f"{100 * correct / len(samples):.1f} %", shown)
    if table.row_count:
        console.print(table)


def _natural(text: str) -> list[tuple[int, str]]:
    """Sort C2 before C10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


def _read_samples(file: Path) -> list[tuple[Any, list[Mapping[str, Any]]]]:
    """Return ground truth and samples of each prompt, in the order of the file."""
    import json

    from hpo_plugin.tasks.sources import read_file

    prompts: dict[tuple[str, str], tuple[Any, list[Mapping[str, Any]]]] = {}
    for number, row in enumerate(read_file(file)):
        if not isinstance(row, Mapping) or not {"gts", "score"} <= row.keys() or not {"uid", "input"} & row.keys():
            raise ValueError(
                f"{file}, line {number + 1} is not a sample of verl's validation: it must have gts, score, and uid or "
                "input. Use a file of trainer.validation_data_dir."
            )
        for name in ("score", "acc"):
            if name in row and not isinstance(row[name], int | float):
                raise ValueError(f"{file}, line {number + 1}: {name}={row[name]!r:.100} is not a number")
        # verl's default trainer names samples <prompt>_<session>_<index>.
        prompt = str(row["uid"]).rsplit("_", 2)[0] if "uid" in row else str(row["input"])
        key = (prompt, json.dumps(row["gts"], sort_keys=True))
        prompts.setdefault(key, (row["gts"], []))[1].append(row)
    if not prompts:
        raise ValueError(f"{file} has no samples")
    return list(prompts.values())


_TASK = "TASK is a name below, or the path of a task's file."

prepare = task_commands(f"Write the data files of a task in verl's parquet format. {_TASK}", _prepare_command)
explain = task_commands(f"Explain the answer to a row of a task. {_TASK}", _explain_command)
score = task_commands(f"Compute metrics from the samples of a validation. {_TASK}", _score_command)
