"""``hpo-plugin launch``: trains on a Ray cluster to the last step, and resumes after failures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def launch(
    config_name: Annotated[str, typer.Option(help="Trainer config, for example hpo_trainer.", show_default=False)],
    run_dir: Annotated[
        Path,
        typer.Option(
            help="Directory for logs, metrics and checkpoints, on a file system that all nodes share. If it has a run, "
            "the command resumes the run.",
            show_default=False,
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Overrides, as for `python -m verl.trainer.main_ppo`.", show_default=False),
    ] = None,
    retries: Annotated[
        int, typer.Option(min=0, help="Maximum number of restarts after consecutive failures without a new checkpoint.")
    ] = 3,
    wait_for_nodes: Annotated[
        float, typer.Option(min=0, help="Maximum time to wait for the nodes of the run, in seconds.")
    ] = 600.0,
    timeout: Annotated[float, typer.Option(min=1, help="Time limit for the checks of a node, in seconds.")] = 300.0,
    stall: Annotated[
        float, typer.Option(min=1, help="Time without a step after which the trainer counts as failed, in seconds.")
    ] = 3600.0,
) -> None:
    """Train on the Ray cluster of RAY_ADDRESS, or of ray_kwargs.ray_init in the config.

    The command waits for trainer.nnodes nodes with trainer.n_gpus_per_node
    accelerators, runs the checks of `hpo-plugin check` on all of them, and
    trains. If the trainer fails, the command resumes the run from the last
    checkpoint. Run the same command again to resume a run that was stopped.

    Exit status 0: finished; 1: failed; 143 or 130: stopped by SIGTERM or
    Ctrl-C.
    """
    import signal
    import sys

    from hpo_plugin.cli.requirements import require

    require("launch", "verl")
    from hpo_plugin.check.signals import interruptible
    from hpo_plugin.console import stopped, terminal
    from hpo_plugin.runs.launch import Launch, run_launch
    from hpo_plugin.runs.training import TrainingError

    # An explicit file: the checks redirect standard output, but not that of the launcher.
    console = terminal(file=sys.stdout, highlight=False, soft_wrap=not sys.stdout.isatty())
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
        console.print(f"Stopped by {name}. Run the same command again to resume from the last checkpoint.")
        raise typer.Exit(128 + signal.Signals[name]) from None
