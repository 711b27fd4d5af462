"""``hpo-plugin check``: can HPO run here, on every node, with this config?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def check(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Overrides, as for `python -m verl.trainer.main_ppo`.", show_default=False),
    ] = None,
    config_name: Annotated[
        str | None,
        typer.Option(help="The trainer config to check, for example hpo_trainer. Without it: the installation only."),
    ] = None,
    config_dir: Annotated[Path | None, typer.Option(help="A directory with configs of your own.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds a node has to answer.")] = 120.0,
    local: Annotated[bool, typer.Option("--local", help="Look at this process only; start or join no Ray.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check versions, registration on every node of the Ray cluster, and a config. Exit status 0 or 1.

    The cluster is the one that verl would use: ray_kwargs.ray_init of the config, RAY_ADDRESS, or a local one that is
    started for the check.
    """
    import contextlib
    import sys

    from rich.console import Console

    from hpo_plugin.cli.requirements import require

    require("check", "verl")
    from hpo_plugin.check.checks import run_checks

    console, errors = Console(), Console(stderr=True)
    show_status = errors.is_terminal and not as_json
    with contextlib.ExitStack() as stack:
        status = stack.enter_context(errors.status("checking")) if show_status else None
        # verl and Ray print while they are imported; standard output is for the report.
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        report = run_checks(
            config_name,
            overrides or [],
            config_dir=config_dir,
            timeout=timeout,
            local=local,
            progress=status.update if status else None,
        )
    if as_json:
        print(report.to_json())
    else:
        report.show(console)
    raise typer.Exit(0 if report.ok else 1)
