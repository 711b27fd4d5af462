"""``hpo-plugin study``: runs a matrix of arms, settings and seeds from one file, collects the data, and reports it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from hpo_plugin.study.cells import Workspace
    from hpo_plugin.study.spec import Cell

app = typer.Typer(no_args_is_help=True, help="Run a study, a matrix of arms, settings and seeds, and report it.")

StudyFile = Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="File of the study.", show_default=False)]
Output = Annotated[
    Path,
    typer.Option(help="Directory for runs, data and start models, in a subdirectory with the name of the study."),
]
Only = Annotated[
    list[str] | None,
    typer.Option(
        help="Select cells by setting, arm or seed (seed0), or by several of them joined by '/'. May be repeated."
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(help="File of the collected data. Default: STUDY.parquet next to STUDY.yaml.", show_default=False),
]
DEFAULT_OUTPUT = Path("runs")


def _data_file(study_file: Path, data: Path | None) -> Path:
    return study_file.with_suffix(".parquet") if data is None else data


def _load(study_file: Path, output: Path, only: list[str] | None) -> tuple[Workspace, list[Cell]]:
    from hpo_plugin.study.cells import Workspace
    from hpo_plugin.study.spec import load_study, select

    study = load_study(study_file)
    return Workspace(study, output), select(study.cells(), only or [])


@app.command()
def prepare(
    study_file: StudyFile,
    output: Output = DEFAULT_OUTPUT,
    only: Only = None,
    check: Annotated[bool, typer.Option(help="Check the installation and the configs.")] = True,
) -> None:
    """Make the data and start models, and check the config of each arm in each setting.

    `hpo-plugin study run` runs this command first.
    """
    from hpo_plugin.cli.requirements import require

    require("study prepare", "verl", "study")
    from hpo_plugin.check.signals import interruptible
    from hpo_plugin.console import stopped, terminal
    from hpo_plugin.study.inputs import check_cells, compose_cells, make_study_inputs
    from hpo_plugin.study.spec import StudyError

    console = terminal(highlight=False)
    try:
        with interruptible():
            workspace, cells = _load(study_file, output, only)
            if any(workspace.study.settings[cell.setting].prepare for cell in cells):
                # The study makes its own start models.
                require("study prepare", "cpu")
            workspace.directory.mkdir(parents=True, exist_ok=True)
            compose_cells(cells)
            make_study_inputs(workspace, cells, console)
            if check:
                check_cells(workspace, cells, console)
    except (StudyError, OSError) as error:
        raise stopped(error) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@app.command()
def run(
    study_file: StudyFile,
    output: Output = DEFAULT_OUTPUT,
    data: Data = None,
    only: Only = None,
    jobs: Annotated[int, typer.Option(min=1, help="Number of cells that run at the same time.")] = 1,
    stall: Annotated[
        float, typer.Option(min=1, help="Time without progress after which a cell counts as failed, in seconds.")
    ] = 900.0,
    print_commands: Annotated[
        bool,
        typer.Option("--print", help="Print the command that submits each unfinished cell to a cluster. Run nothing."),
    ] = False,
    submit: Annotated[bool, typer.Option("--submit", help="Submit the unfinished cells to a cluster.")] = False,
    again: Annotated[
        bool, typer.Option("--again", help="With --submit: also submit cells that were submitted before.")
    ] = False,
) -> None:
    """Run the unfinished cells. Run the same command again to resume a study.

    If a cell fails, the other cells still run, and the next call tries the
    cell again.

    Exit status 1: a cell failed.
    """
    from hpo_plugin.cli.requirements import require

    require("study run", "verl", "study")
    from hpo_plugin.check.signals import interruptible
    from hpo_plugin.console import stopped, terminal
    from hpo_plugin.study.collect import check_same_inputs
    from hpo_plugin.study.data import read_data
    from hpo_plugin.study.inputs import prepare_in_child
    from hpo_plugin.study.run import StudyRun, show_failures
    from hpo_plugin.study.spec import StudyError

    console = terminal(highlight=False)
    try:
        if print_commands and submit:
            raise StudyError("--print and --submit exclude each other. Remove one of them.")
        if again and not submit:
            raise StudyError("--again needs --submit. Add --submit, or remove --again.")
        with interruptible():
            workspace, cells = _load(study_file, output, only)
            collected = read_data(_data_file(study_file, data))
            work = StudyRun(workspace, cells, collected, stall=stall, console=console)
            if not work.unfinished:
                console.print(f"nothing to run: {len(cells)} cells are finished, or another process is running them")
                return
            prepare_in_child(study_file, output, only or [], check=not (print_commands or submit))
            check_same_inputs(workspace, collected, cells)
            if print_commands or submit:
                _hand_over(workspace, work.unfinished, submit=submit, again=again)
                return
            work.run(jobs)
    except (StudyError, OSError) as error:
        raise stopped(error) from None
    except KeyboardInterrupt:
        console.print(
            "Interrupted; all processes of the cells have stopped. Run the same command again to resume them."
        )
        raise typer.Exit(130) from None
    show_failures(work.failed, console)
    if work.failed:
        console.print(f"\n{len(work.failed)} cells failed. Run the same command again to retry them.", style="bold red")
        raise typer.Exit(1)


def _hand_over(workspace: Workspace, cells: list[Cell], *, submit: bool, again: bool) -> None:
    from hpo_plugin.study.cells import submitted_file
    from hpo_plugin.study.run import submit_cell, submit_command

    for cell in cells:
        if not submit:
            print(submit_command(workspace, cell))
        elif again or not submitted_file(workspace.run(cell)).exists():
            print(f"{cell.name}: {submit_cell(workspace, cell)}")


@app.command()
def status(study_file: StudyFile, output: Output = DEFAULT_OUTPUT, data: Data = None, only: Only = None) -> None:
    """Show the state of each cell, and why cells failed."""
    from hpo_plugin.cli.requirements import require

    require("study status", "study")
    from hpo_plugin.console import stopped, terminal
    from hpo_plugin.study.cells import State
    from hpo_plugin.study.data import read_data
    from hpo_plugin.study.run import look, show_failures, state_table
    from hpo_plugin.study.spec import StudyError

    console = terminal(highlight=False)
    try:
        workspace, cells = _load(study_file, output, only)
        entries = look(workspace, cells, read_data(_data_file(study_file, data)))
    except (StudyError, OSError) as error:
        raise stopped(error) from None
    console.print(state_table(workspace.study, entries))
    console.print()
    for entry in entries:
        if entry.state is State.RUNNING:
            line = entry.view.line(entry.cell.steps) if entry.view else "starting"
            console.print(f"{entry.cell.name}: {line}", soft_wrap=True)
    show_failures([entry for entry in entries if entry.state is State.FAILED], console)
    counts = {state: sum(entry.state is state for entry in entries) for state in State}
    console.print(", ".join(f"{count} {state.value}" for state, count in counts.items() if count))


@app.command()
def collect(
    study_file: StudyFile,
    output: Output = DEFAULT_OUTPUT,
    data: Data = None,
    prune: Annotated[bool, typer.Option("--prune", help="Remove collected cells that are not in the study.")] = False,
) -> None:
    """Collect the logs of all finished cells in one parquet file.

    Cells that were collected before stay in the file.
    """
    from hpo_plugin.cli.requirements import require

    require("study collect", "study")
    from hpo_plugin.console import listed, stopped, terminal
    from hpo_plugin.study.collect import collect as collect_cells
    from hpo_plugin.study.spec import StudyError

    path = _data_file(study_file, data)
    try:
        workspace, _ = _load(study_file, output, None)
        done = collect_cells(workspace, path, prune=prune)
    except (StudyError, OSError, ValueError) as error:
        raise stopped(error) from None
    console = terminal(highlight=False, soft_wrap=True)
    console.print(f"{path}: {path.stat().st_size / 1000:.0f} kB")
    for label, names in (("added", done.added), ("replaced", done.replaced), ("not finished", done.missing)):
        if names:
            console.print(f"{label}: {len(names)} ({listed(names)})")
    if done.kept:
        console.print(f"unchanged: {len(done.kept)}")
    if done.foreign:
        console.print(
            f"removed, because not in the study: {done.foreign}"
            if prune
            else f"kept, although not in the study: {done.foreign} (--prune removes them)"
        )


@app.command()
def report(
    study_file: StudyFile,
    data: Data = None,
    output: Annotated[Path, typer.Option(help="Directory for the pages and pictures.")] = Path("report"),
    png: Annotated[bool, typer.Option(help="Also write the pictures as PNG.")] = True,
) -> None:
    """Write a report of the collected data: Markdown and HTML pages, SVG and PNG pictures.

    The command needs only STUDY.yaml and the data. The same data give the
    same bytes. The HTML page is self-contained.
    """
    from hpo_plugin.cli.requirements import require

    require("study report", "study")
    from hpo_plugin.console import stopped
    from hpo_plugin.study.data import read_data
    from hpo_plugin.study.report import build_report, write_report
    from hpo_plugin.study.spec import StudyError, load_study

    path = _data_file(study_file, data)
    try:
        study = load_study(study_file)
        if not path.exists():
            raise StudyError(
                f"{path} does not exist. Run `hpo-plugin study collect` to make it from the finished runs."
            )
        pages = write_report(build_report(study, read_data(path)), output, png=png)
    except (StudyError, OSError) as error:
        raise stopped(error) from None
    for page in pages:
        print(page)
