"""``hpo-plugin quickstart``: verl's own trainer, with A-HPO, learns a task on this machine."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Rollout(str, Enum):
    """Who generates the responses."""

    HF = "hf"
    VLLM = "vllm"


def quickstart(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Further overrides of the task's config, such as countdown_cpu, in Hydra's syntax.", show_default=False
        ),
    ] = None,
    task: Annotated[
        str,
        typer.Option(
            help="countdown; telelogs, in a reduced form, after a stage of supervised fine-tuning; or a task's file."
        ),
    ] = "countdown",
    policy_loss: Annotated[
        str, typer.Option(help="ahpo, hpo, grpo, gspo, sapo, dapo, dr_grpo or cispo: algorithm.policy_loss.")
    ] = "ahpo",
    seed: Annotated[int, typer.Option(min=0, help="Seed of data, start model and sampling.")] = 0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps. Default: the task's, 60 for countdown, 40 for telelogs.")
    ] = None,
    rollout: Annotated[
        Rollout, typer.Option(help="hf: transformers' own generate. vllm: verl's vLLM rollout (extra cpu-vllm).")
    ] = Rollout.HF,
    output: Annotated[Path, typer.Option(help="Where runs, data and start models go.")] = Path("runs"),
    n_test: Annotated[int, typer.Option(min=1, help="Held-out problems; of Countdown up to 700.")] = 512,
    new: Annotated[
        bool, typer.Option("--new", help="Start another run, even if an unfinished one could be resumed.")
    ] = False,
    stall: Annotated[float, typer.Option(min=1, help="Seconds without progress after which to give up.")] = 600.0,
) -> None:
    """Train a small model on a task with verl's own trainer, on this machine's CPU cores.

    Makes the data and a start model, checks the installation, trains, evaluates on held-out problems before and after,
    and draws the curves. The same command resumes a run that was interrupted, or else starts another one.
    """
    import sys

    from rich.console import Console

    from hpo_plugin.cli.requirements import require

    require("quickstart", "cpu")
    from hpo_plugin.verl.presets import preset_rows

    if policy_loss not in preset_rows():
        raise typer.BadParameter(
            f"{policy_loss!r} is not a preset. Choose one of: {', '.join(preset_rows())}.", param_hint="--policy-loss"
        )

    from hpo_plugin.check.signals import interruptible
    from hpo_plugin.quickstart.run import run_quickstart
    from hpo_plugin.runs.directory import RunRequest
    from hpo_plugin.runs.training import TrainingError
    from hpo_plugin.tasks.task import TaskError, laptop_form, load_task

    try:
        form = laptop_form(load_task(task))
    except TaskError as error:
        raise typer.BadParameter(str(error), param_hint="--task") from None
    request = RunRequest(
        policy_loss=policy_loss,
        seed=seed,
        steps=form.steps if steps is None else steps,
        rollout=rollout.value,
        n_test=n_test,
        overrides=tuple(overrides or ()),
        task=task,
    )
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    try:
        with interruptible():
            run_quickstart(request, output, new=new, stall=stall, console=console)
    except TrainingError as error:
        console.print()
        console.print(str(error), style="red", markup=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print("\nInterrupted; all processes of the run have stopped. The same command resumes the run.")
        raise typer.Exit(130) from None
