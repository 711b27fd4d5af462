"""``hpo-plugin quickstart``: verl's own trainer, with A-HPO, learns a task on this machine."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Task(str, Enum):
    """What is learned."""

    COUNTDOWN = "countdown"
    TELELOGS = "telelogs"


class Rollout(str, Enum):
    """Who generates the responses."""

    HF = "hf"
    VLLM = "vllm"


def quickstart(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Further overrides of the config countdown_cpu or telelogs_cpu, in Hydra's syntax.", show_default=False
        ),
    ] = None,
    task: Annotated[
        Task,
        typer.Option(help="countdown, or telelogs in a reduced form, with a stage of supervised fine-tuning first."),
    ] = Task.COUNTDOWN,
    policy_loss: Annotated[
        str, typer.Option(help="ahpo, hpo, grpo, gspo, sapo, dapo, dr_grpo or cispo: algorithm.policy_loss.")
    ] = "ahpo",
    seed: Annotated[int, typer.Option(min=0, help="Of data, start model and sampling.")] = 0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps. Default 60 for countdown, 40 for telelogs.")
    ] = None,
    rollout: Annotated[
        Rollout, typer.Option(help="hf: transformers' own generate. vllm: verl's vLLM rollout (extra cpu-vllm).")
    ] = Rollout.HF,
    output: Annotated[Path, typer.Option(help="Where runs, data and start models go.")] = Path("runs"),
    n_test: Annotated[int, typer.Option(min=1, max=700, help="Held-out problems.")] = 512,
    new: Annotated[
        bool, typer.Option("--new", help="Start another run, even if an unfinished one could go on.")
    ] = False,
    stall: Annotated[float, typer.Option(min=1, help="Seconds without progress after which to give up.")] = 600.0,
) -> None:
    """Train a small model on Countdown or TeleLogs with verl's own trainer, on this machine's CPU cores.

    Makes the data and a start model, checks the installation, trains, evaluates on held-out problems before and after,
    and draws the curves. The same call again goes on with a run that was interrupted, or else starts another one.
    """
    import sys

    from rich.console import Console

    from hpo_plugin.glue.presets import preset_rows

    if policy_loss not in preset_rows():
        raise typer.BadParameter(
            f"{policy_loss!r} is not a preset. Choose one of: {', '.join(preset_rows())}.", param_hint="--policy-loss"
        )

    from hpo_plugin.cli._laptop import LAPTOP_TASKS
    from hpo_plugin.cli._quickstart import run_quickstart
    from hpo_plugin.cli._runs import Request
    from hpo_plugin.cli._trainer import interruptible
    from hpo_plugin.cli._training import TrainingError

    request = Request(
        policy_loss=policy_loss,
        seed=seed,
        steps=LAPTOP_TASKS[task.value].steps if steps is None else steps,
        rollout=rollout.value,
        n_test=n_test,
        overrides=tuple(overrides or ()),
        task=task.value,
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
        console.print("\nInterrupted; every process of the run is ended. The same command goes on from its checkpoint.")
        raise typer.Exit(130) from None
