"""``hpo-plugin prepare``: data files for verl."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from hpo_plugin.tasks._files import Publication
    from hpo_plugin.tasks.telelogs import TeleLogsData

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

    from hpo_plugin.cli._errors import stopped
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
        raise stopped(error) from None
    _print_report(made.manifest["counts"], (made.train_file, made.test_file), made.publication)


@app.command()
def telelogs(
    output: Annotated[Path, typer.Option(help="Directory for the parquet files and manifest.json.")],
    source: Annotated[
        str,
        typer.Option(
            help="synthetic; hub: the gated data set netop/TeleLogs with your own access; or a local "
            ".parquet/.json/.jsonl/.csv file with the columns question and answer."
        ),
    ] = "synthetic",
    test_source: Annotated[
        str | None, typer.Option(help="A file with the test split, where --source is one with the training split.")
    ] = None,
    train_size: Annotated[int | None, typer.Option(min=1, help="Synthetic training rows. Default 2400.")] = None,
    test_size: Annotated[int | None, typer.Option(min=1, help="Synthetic test rows. Default 864.")] = None,
    balance: Annotated[
        str | None,
        typer.Option(help="Classes of the synthetic training split: train (default: the published shares) or uniform."),
    ] = None,
    reduction: Annotated[
        str | None, typer.Option(help="Synthetic cases: full (default), or laptop: some 200 characters, 5 causes.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of cases, labels and splits.")] = 0,
    relabeled: Annotated[
        bool, typer.Option("--relabeled", help="Also the test split under random labels, options and table order.")
    ] = False,
    sft: Annotated[
        bool, typer.Option("--sft", help="Also the oracle's chains of thought, for verl's SFT trainer.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace other data in the directory.")] = False,
) -> None:
    """Write TeleLogs cases, with a training and a held-out split, for verl.

    The same options give the same bytes. Existing identical data is left alone; other data is not overwritten.
    """
    from rich.console import Console

    from hpo_plugin.cli._errors import stopped
    from hpo_plugin.cli._progress import stage_bars
    from hpo_plugin.tasks.telelogs import prepare_telelogs

    errors = Console(stderr=True)
    try:
        with stage_bars(errors, transient=False) as show:
            made = prepare_telelogs(
                output,
                source=source,
                test_source=test_source,
                train_size=train_size,
                test_size=test_size,
                balance=balance,
                reduction=reduction,
                seed=seed,
                relabeled=relabeled,
                sft=sft,
                force=force,
                progress=show,
            )
    except (ValueError, OSError) as error:
        raise stopped(error) from None
    _print_telelogs_report(made)


def _print_report(counts: Mapping[str, Any], files: Iterable[Path], publication: Publication) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in counts.items():
        if isinstance(value, int):
            table.add_row(name.replace("_", " "), f"{value:,}")
        elif isinstance(value, str):
            table.add_row(name.replace("_", " "), value)
        elif isinstance(value, Mapping):
            for kind, count in value.items():
                table.add_row(f"{name.replace('_', ' ')}: {kind}", f"{count:,}")
    for path in files:
        state = "written" if path.name in publication.written else "already there, identical"
        table.add_row(str(path), state)
    console = Console()
    console.print(table, soft_wrap=True)
    for name, examples in counts.items():
        if name.endswith("_examples"):
            for example in examples:
                console.print(f"{name.removesuffix('_examples')}: {example}", markup=False, highlight=False)


def _print_telelogs_report(made: TeleLogsData) -> None:
    from rich.console import Console

    counts = dict(made.manifest["counts"])
    for split, agreement in made.manifest["oracle"].items():
        rows = sum(sum(found.values()) for found in agreement.values())
        agreed = sum(found.get(cause, 0) for cause, found in agreement.items())
        counts[f"{split}: the rules agree with the label"] = f"{agreed:,} of {rows:,} ({100 * agreed / rows:.1f} %)"
    leakage = made.leakage
    counts["base scenarios, train and test"] = f"{leakage.train_scenarios:,} and {leakage.test_scenarios:,}"
    counts["in both"] = f"{leakage.shared_scenarios:,}"
    names = [*made.files.values()]
    refused = next(iter(names)).parent / "refused.jsonl"
    if refused.name in (*made.publication.written, *made.publication.unchanged):
        names.append(refused)
    _print_report(counts, names, made.publication)
    if leakage.shared_scenarios:
        Console(stderr=True).print(
            f"warning: {leakage.train_rows:,} training rows and {leakage.test_rows:,} test rows share a base scenario; "
            "held-out success will be too high",
            style="yellow",
            highlight=False,
            soft_wrap=True,
        )
