"""``hpo-plugin launch``: a training on a Ray cluster, to its last step."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def launch(
    config_name: Annotated[str, typer.Option(help="The trainer config, for example hpo_trainer.", show_default=False)],
    run_dir: Annotated[
        Path,
        typer.Option(
            help="For logs, metrics and checkpoints, on a file system that all nodes share. A run there is resumed.",
            show_default=False,
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Overrides, as for `python -m verl.trainer.main_ppo`.", show_default=False),
    ] = None,
    retries: Annotated[
        int, typer.Option(min=0, help="Starts after failures in a row without a new checkpoint, before giving up.")
    ] = 3,
    wait_for_nodes: Annotated[float, typer.Option(min=0, help="Seconds to wait for the nodes of the run.")] = 600.0,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds a node has to answer the checks.")] = 300.0,
    stall: Annotated[
        float, typer.Option(min=1, help="Seconds without a step after which the trainer counts as failed.")
    ] = 3600.0,
) -> None:
    """Train on a Ray cluster: RAY_ADDRESS, or ray_kwargs.ray_init of the config.

    Waits for trainer.nnodes nodes with trainer.n_gpus_per_node accelerators, runs the checks of `hpo-plugin check` on
    all of them, and trains. Where the trainer fails, it resumes from the last checkpoint; the same command resumes a
    run that was stopped. Exit status 0: finished; 1: failed; 143 or 130: stopped by SIGTERM or Ctrl-C.
    """
    import signal
    import sys

    from rich.console import Console

    from hpo_plugin.cli.requirements import require

    require("launch", "verl")
    from hpo_plugin.check.signals import interruptible
    from hpo_plugin.console import stopped
    from hpo_plugin.runs.launch import Launch, run_launch
    from hpo_plugin.runs.training import TrainingError

    # The file is named: while others' output is sent elsewhere, the launcher's own is not.
    console = Console(file=sys.stdout, highlight=False, soft_wrap=not sys.stdout.isatty())
    wanted = Launch(
        config_name=config_name,
        overrides=tuple(overrides or ()),
        directory=run_dir,
        retries=retries,
        wait=wait_for_nodes,
        timeout=timeout,
        stall=stall,
    )
    try:
        with interruptible():
            run_launch(wanted, console)
    except TrainingError as error:
        raise stopped(error) from None
    except KeyboardInterrupt as ended:
        name = str(ended) or "SIGINT"
        console.print(f"Stopped by {name}; the same command resumes from the last checkpoint.")
        raise typer.Exit(128 + signal.Signals[name]) from None
