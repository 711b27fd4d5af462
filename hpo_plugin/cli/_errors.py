"""How a command says that it cannot do what was asked."""

from __future__ import annotations

import typer


def stopped(error: Exception) -> typer.Exit:
    """Print an error on standard error, in one line and as it is; return what the command raises: exit status 1.

    Args:
        error: Its text says what is wrong and what to do.
    """
    from rich.console import Console

    errors = Console(stderr=True)
    errors.print("[bold red]error:[/] ", end="")
    errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
    return typer.Exit(1)
