"""``hpo-plugin quickstart``: trains a small model on a task, with verl's own trainer on CPU cores."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Rollout(str, Enum):
    """The rollout backend."""

    HF = "hf"
    VLLM = "vllm"


def quickstart(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Additional Hydra overrides of the task's config, for example of countdown_cpu.", show_default=False
        ),
    ] = None,
    task: Annotated[
        str,
        typer.Option(
            help="countdown, telelogs, or the path of a task's file. telelogs uses a reduced form of the task, after "
            "supervised fine-tuning."
        ),
    ] = "countdown",
    policy_loss: Annotated[
        str, typer.Option(help="Value of algorithm.policy_loss: ahpo, hpo, grpo, gspo, sapo, dapo, dr_grpo or cispo.")
    ] = "ahpo",
    seed: Annotated[int, typer.Option(min=0, help="Seed of data, start model and sampling.")] = 0,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of training steps. Default: set by the task, 60 for countdown and 40 for telelogs."
        ),
    ] = None,
    rollout: Annotated[
        Rollout, typer.Option(help="hf: generate of transformers. vllm: verl's vLLM rollout (extra cpu-vllm).")
    ] = Rollout.HF,
    output: Annotated[Path, typer.Option(help="Directory for runs, data and start models.")] = Path("runs"),
    n_test: Annotated[int, typer.Option(min=1, help="Number of held-out problems; at most 700 for countdown.")] = 512,
    new: Annotated[
        bool, typer.Option("--new", help="Start a new run, even if an unfinished run could be resumed.")
    ] = False,
    stall: Annotated[
        float,
        typer.Option(min=1, help="Time without progress after which the check or the run has failed, in seconds."),
    ] = 600.0,
) -> None:
    """Train a small model on a task, with verl's own trainer on CPU cores.

    The command makes the data and a start model, checks the installation,
    trains, evaluates on held-out problems before and after the training,
    and draws the curves. Run the same command again to resume an
    interrupted run. If there is none, the command starts a new run.
    """
    import sys

    from hpo_plugin.cli.requirements import require

    require("quickstart", "cpu")
    from hpo_plugin.verl.presets import preset_rows

    if policy_loss not in preset_rows():
        raise typer.BadParameter(
            f"{policy_loss!r} is not a preset. Choose one of: {', '.join(preset_rows())}.", param_hint="--policy-loss"
        )

    from hpo_plugin.check.signals import interruptible
    from hpo_plugin.console import terminal
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
    console = terminal(highlight=False, soft_wrap=not sys.stdout.isatty())
    try:
        with interruptible():
            run_quickstart(request, output, new=new, stall=stall, console=console)
    except TrainingError as error:
        console.print()
        console.print(str(error), style="red")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print("\nInterrupted; all processes of the run have stopped. Run the same command again to resume it.")
        raise typer.Exit(130) from None
