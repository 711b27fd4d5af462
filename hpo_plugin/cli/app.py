"""The ``hpo-plugin`` command: each subcommand lives in a module of its own and is imported only when it is run."""

import typer

from hpo_plugin.cli import check, prepare, quickstart

app = typer.Typer(no_args_is_help=True, add_completion=False, help="HPO and A-HPO for verl.")
app.add_typer(prepare.app, name="prepare")
app.command()(check.check)
app.command()(quickstart.quickstart)
