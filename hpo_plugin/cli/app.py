"""The ``hpo-plugin`` command: each subcommand lives in a module of its own and is imported only when it is run."""

import typer

from hpo_plugin.cli import check, explain, launch, prepare, quickstart, score, study, upstream

app = typer.Typer(no_args_is_help=True, add_completion=False, help="HPO and A-HPO for verl.")
app.add_typer(prepare.app, name="prepare")
app.add_typer(explain.app, name="explain")
app.add_typer(score.app, name="score")
app.add_typer(study.app, name="study")
app.command()(check.check)
app.command()(launch.launch)
app.command()(quickstart.quickstart)
app.command()(upstream.upstream)
