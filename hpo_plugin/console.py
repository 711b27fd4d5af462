"""Terminal output of the commands: progress bars, notes and errors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

#: Receives a stage's name, the work done and the total.
Progress: TypeAlias = Callable[[str, int, int], None]


@contextlib.contextmanager
def stage_bars(console: Console, *, transient: bool) -> Iterator[Progress]:
    """Show one progress bar per stage. Without a terminal, show nothing.

    Args:
        console: The console to draw on.
        transient: Whether to remove the bars at the end.

    Yields:
        The function that receives progress.
    """
    from rich import progress as bars

    with bars.Progress(
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
        console=console,
        transient=transient,
        disable=not console.is_terminal,
    ) as bar:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done)

        yield show


def note(console: Console, label: str, text: str) -> None:
    """Print a line with a dimmed label.

    Args:
        console: The console to print to.
        label: At most 8 characters.
        text: The text after it.
    """
    from rich.text import Text

    line = Text(f"{label:<9}", style="dim")
    console.print(line.append(text, style="default"))


def stopped(error: Exception) -> SystemExit:
    """Print an error to standard error in one line, without markup.

    Args:
        error: Its text says what is wrong and what to do.

    Returns:
        What the command raises: exit status 1.
    """
    from rich.console import Console

    errors = Console(stderr=True)
    errors.print("[bold red]error:[/] ", end="")
    errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
    return SystemExit(1)
