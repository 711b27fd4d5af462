"""The ``hpo-plugin`` command. Commands import what they need when they run."""

import typer

from hpo_plugin.cli import check, files, launch, preview, quickstart, study, tasks

app = typer.Typer(no_args_is_help=True, add_completion=False, help="HPO and A-HPO for verl, TRL and OpenRLHF.")
app.add_typer(tasks.prepare, name="prepare")
app.add_typer(tasks.explain, name="explain")
app.add_typer(tasks.score, name="score")
app.add_typer(study.app, name="study")
app.command()(check.check)
app.command()(launch.launch)
app.command()(preview.preview)
app.command()(files.files)
app.command()(quickstart.quickstart)
