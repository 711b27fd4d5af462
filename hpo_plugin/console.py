"""Terminal output of the commands: the console, progress bars, notes and errors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.progress import TaskID
    from rich.segment import Segment
    from rich.text import Text

#: Receives a stage's name, the work done and the total.
Progress: TypeAlias = Callable[[str, int, int], None]
#: Maximum number of names in a line of output, of nodes or of cells.
LISTED = 16

#: Control character -> its notation in Python, for all but the line break and the tab.
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def terminal(**options: Any) -> Console:
    """Return a console that prints text unchanged, with visible control characters.

    Names, responses and logs can contain rich's markup and the escape sequences of a terminal. The console interprets
    neither.

    Args:
        **options: Arguments of :class:`rich.console.Console`.
    """
    from rich.console import Console

    class Terminal(Console):
        # Before the layout, so that a table has space for the notation.
        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(text.translate(_CONTROL), **options)

        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
            for segment in super().render(renderable, options):
                yield segment if segment.control else segment._replace(text=segment.text.translate(_CONTROL))

    return Terminal(markup=False, emoji=False, **options)


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
        bars.TextColumn("{task.description}", markup=False),
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


def listed(names: Iterable[str]) -> str:
    """Names in one line: the first :data:`LISTED`, and the number of the others."""
    texts = list(names)
    others = len(texts) - LISTED
    return ", ".join(texts[:LISTED]) + (f" and {others} more" if others > 0 else "")


def stopped(error: Exception) -> SystemExit:
    """Print an error to standard error in one line, without markup.

    Args:
        error: Its text says what is wrong and what to do.

    Returns:
        What the command raises: exit status 1.
    """
    errors = terminal(stderr=True, highlight=False)
    errors.print("error: ", style="bold red", end="")
    errors.print(str(error), soft_wrap=True)
    return SystemExit(1)
