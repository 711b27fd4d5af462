"""``hpo-plugin files``: the cluster scripts and the studies, for users of the wheel."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def files(
    directory: Annotated[
        Path,
        typer.Argument(
            help="Target directory. It is created if it does not exist.", show_default="the current directory"
        ),
    ] = Path("."),
    force: Annotated[bool, typer.Option("--force", help="Overwrite files with other content.")] = False,
) -> None:
    """Write the recipes, cluster scripts and studies of this package to a directory.

    recipes/ has the SLURM script, the KubeRay manifest and the commands
    of each task. studies/ has the declarations of studies. Files that
    exist with other content are not overwritten without --force.

    Exit status 0: written, or the same content exists already;
    1: refused, or a file cannot be written; 2: wrong arguments.
    """
    import shlex

    from hpo_plugin.console import note, stopped, terminal
    from hpo_plugin.shipped import copy_files, shipped_files

    console = terminal(highlight=False, soft_wrap=True)
    try:
        copied = copy_files(shipped_files(), directory, force=force)
    except OSError as error:
        raise stopped(error) from None
    for name in copied.unchanged:
        note(console, "same", str(directory / name))
    for name in copied.written:
        note(console, "wrote", str(directory / name))
    # Commands in these files, and paths in studies, are relative to the directory.
    enter = [] if directory.resolve() == Path.cwd() else [f"cd {shlex.quote(str(directory))}"]
    console.print(
        "\nNext, adapt the #SBATCH lines of recipes/cluster/slurm.sbatch, or kuberay.yaml, and start a run:\n"
    )
    for line in [
        *enter,
        "sbatch --nodes=2 --gpus-per-node=8 recipes/cluster/slurm.sbatch --run-dir=/shared/runs/first \\",
        "  --config-name=hpo_trainer algorithm.policy_loss=ahpo ...",
        "hpo-plugin study run studies/paper-countdown.yaml --print",
    ]:
        console.print(f"  {line}")
    console.print(
        "\nrecipes/README.md and recipes/cluster/README.md explain the arguments. Their links to docs/ lead to the "
        "documentation, which is not part of the package."
    )
