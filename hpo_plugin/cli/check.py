"""``hpo-plugin check``: checks the installation, every node of a Ray cluster, and a config."""

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
        typer.Option(
            help="Trainer config to check, for example hpo_trainer. Without it, only the installation is checked."
        ),
    ] = None,
    config_dir: Annotated[Path | None, typer.Option(help="Additional directory to search for configs.")] = None,
    timeout: Annotated[float, typer.Option(help="Time limit for the answer of a node, in seconds.")] = 120.0,
    local: Annotated[bool, typer.Option("--local", help="Check only this process. Do not start or join Ray.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Check the installation, every node of a Ray cluster, and a config.

    The checks use the cluster that verl would use: ray_kwargs.ray_init
    of the config, RAY_ADDRESS, or a local cluster started for the check.

    Exit status 0: all checks passed; 1: a check failed.
    """
    import contextlib
    import sys

    from hpo_plugin.cli.requirements import require

    require("check", "verl")
    from hpo_plugin.check.checks import run_checks
    from hpo_plugin.console import terminal

    console, errors = terminal(), terminal(stderr=True)
    show_status = errors.is_terminal and not as_json
    with contextlib.ExitStack() as stack:
        status = stack.enter_context(errors.status("checking")) if show_status else None
        # verl and Ray print during import; standard output is for the report.
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
