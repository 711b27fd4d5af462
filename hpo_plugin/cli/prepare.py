"""``hpo-plugin prepare``: data files for verl."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from hpo_plugin.tasks.countdown import CountdownData

app = typer.Typer(no_args_is_help=True, help="Write data files in verl's parquet format.")


@app.callback()
def _prepare() -> None:
    """Write data files in verl's parquet format."""


@app.command()
def countdown(
    output: Annotated[Path, typer.Option(help="Directory for train.parquet, test.parquet and manifest.json.")],
    numbers: Annotated[
        list[int] | None,
        typer.Option(
            help="How many numbers a problem has; repeat for a mixture. Default 3 and 4. With --source FILE or HUB_ID: "
            "keep only such rows."
        ),
    ] = None,
    train_size: Annotated[int | None, typer.Option(help="Default 20000; 327680 for a source.")] = None,
    test_size: Annotated[int | None, typer.Option(help="Default 1024.")] = None,
    seed: Annotated[int | None, typer.Option(help="Default 0.")] = None,
    layout: Annotated[
        str, typer.Option(help="public: TinyZero's wording and <answer> tags; terse: '3 7 5=22:' for small models.")
    ] = "public",
    min_number: Annotated[int | None, typer.Option(help="Smallest given number. Default 1.")] = None,
    max_number: Annotated[int | None, typer.Option(help="Largest given number. Default 99.")] = None,
    min_target: Annotated[int | None, typer.Option(help="Smallest target. Default 10.")] = None,
    max_target: Annotated[int | None, typer.Option(help="Largest target. Default 100.")] = None,
    source: Annotated[
        str,
        typer.Option(
            help="synthetic, a local .parquet/.json/.jsonl/.csv file, or a data set on the Hugging Face hub such as "
            "Jiayi-Pan/Countdown-Tasks-3to4 (its published split is kept)."
        ),
    ] = "synthetic",
    force: Annotated[bool, typer.Option("--force", help="Replace other data in the directory.")] = False,
) -> None:
    """Write Countdown problems, with a training and a held-out split that share none of them.

    The same options give the same bytes. Existing identical data is left alone; other data is not overwritten.
    """
    from rich.console import Console

    from hpo_plugin.cli._progress import stage_bars
    from hpo_plugin.tasks.countdown import CountdownConfig, prepare_countdown

    errors = Console(stderr=True)
    ranges = {
        "min_number": min_number,
        "max_number": max_number,
        "min_target": min_target,
        "max_target": max_target,
        "seed": seed,
    }
    given: dict[str, Any] = {name: value for name, value in ranges.items() if value is not None}
    selection: dict[str, Any] = {}
    if source == "synthetic":
        if numbers:
            given["counts"] = tuple(numbers)
        selection["config"] = CountdownConfig(**given)
    elif given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        errors.print(f"[bold red]error:[/] {options} describe synthetic problems: no effect with --source {source}")
        raise typer.Exit(2)
    else:
        selection["only_counts"] = tuple(numbers or ())
    try:
        with stage_bars(errors, transient=False) as show:
            made = prepare_countdown(
                output,
                layout=layout,
                train_size=train_size,
                test_size=test_size,
                source=source,
                force=force,
                progress=show,
                **selection,
            )
    except (ValueError, OSError) as error:
        errors.print("[bold red]error:[/] ", end="")
        errors.print(str(error), markup=False, highlight=False)
        raise typer.Exit(1) from None
    _print_report(made)


def _print_report(made: CountdownData) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in made.manifest["counts"].items():
        if name != "malformed_examples":
            table.add_row(name.replace("_", " "), f"{value:,}")
    for path in (made.train_file, made.test_file):
        state = "written" if path.name in made.publication.written else "already there, identical"
        table.add_row(str(path), state)
    console = Console()
    console.print(table, soft_wrap=True)
    for example in made.manifest["counts"].get("malformed_examples", ()):
        console.print(f"malformed: {example}", markup=False, highlight=False)
