"""The steps of ``hpo-plugin quickstart``, in order. All training is verl's, under a public config."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from hpo_plugin.cli._laptop import ENVIRONMENT, LAPTOP_TASKS, Inputs, note
from hpo_plugin.cli._runs import Attempt, Request, Run, RunBusyError, choose_run
from hpo_plugin.cli._trainer import end_leftovers, signal_handlers_kept
from hpo_plugin.cli._training import Training, TrainingError, train, trainer_command, write_metrics
from hpo_plugin.cli._verl_log import (
    MetricsFile,
    Rows,
    StepView,
    evaluations,
    held_out_success,
    step_views,
)
from hpo_plugin.variants import VARIANTS

#: Evaluations, besides the one before training.
EVALUATIONS = 3
PICTURE_NAME = "curves.png"

ARM_NAMES = {variant.name: variant.title for variant in VARIANTS.values()} | {
    "grpo": "GRPO",
    "gspo": "GSPO",
    "sapo": "SAPO",
    "dapo": "DAPO",
    "dr_grpo": "Dr. GRPO",
    "cispo": "CISPO",
}


def run_quickstart(request: Request, output: Path, *, new: bool, stall: float, console: Console) -> Run:
    """Do everything.

    Args:
        request: What is asked for.
        output: Where runs, data and start models go.
        new: Do not go on with an unfinished run.
        stall: Seconds without progress after which to give up.
        console: Where to show it.

    Returns:
        The finished run.

    Raises:
        TrainingError: It could not be finished.
        KeyboardInterrupt: Interrupted; nothing of the run is left running.
    """
    begin = time.monotonic()
    # Before verl is imported in this process.
    os.environ.update(ENVIRONMENT)
    name = ARM_NAMES.get(request.policy_loss, request.policy_loss)
    task = LAPTOP_TASKS[request.task]
    console.print(f"[bold]{name} on {task.title}[/], with verl's trainer on this machine's CPU cores")
    try:
        run, resumed = choose_run(output, request, new=new)
        with run.locked():
            note(console, "run", f"{run.directory}{' (goes on)' if resumed else ''}")
            left = end_leftovers(run.processes)
            if left:
                note(console, "", f"ended {left} processes that an earlier call had left running")
            inputs = task.prepare(run, request, output, console)
            _check(run, request, inputs, console)
            _train(run, request, inputs, stall=stall, console=console)
            _finish(run, request, inputs, seconds=time.monotonic() - begin, console=console)
    except (RunBusyError, OSError, ValueError) as error:
        raise TrainingError(f"{type(error).__name__}: {error}") from error
    return run


# --- before training -----------------------------------------------------------------------------------------------


def _check(run: Run, request: Request, inputs: Inputs, console: Console) -> None:
    from hpo_plugin.cli._checks import run_checks, stderr_to

    with contextlib.ExitStack() as stack:
        if console.is_terminal:
            stack.enter_context(console.status("checking the installation and the config"))
        stack.enter_context(signal_handlers_kept())
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        stack.enter_context(stderr_to(run.directory / "check.log"))
        report = run_checks(request.config_name, training_overrides(request, inputs))
    if not report.ok:
        report.show(console)
        raise TrainingError("The checks failed. What to do stands beside each of them.")
    note(console, "check", f"{report.summary}; `hpo-plugin check` shows them")


# --- training ------------------------------------------------------------------------------------------------------


def training_overrides(request: Request, inputs: Inputs) -> list[str]:
    """What makes the public config this run: arm, seed, steps, rollout, and where the inputs are."""
    every = max(1, -(-request.steps // EVALUATIONS))
    return [
        f"algorithm.policy_loss={request.policy_loss}",
        f"cpu_rollout={request.rollout}",
        f"data.train_files={inputs.train_file}",
        f"data.val_files={inputs.test_file}",
        f"data.seed={request.seed}",
        f"actor_rollout_ref.model.path={inputs.model}",
        f"trainer.total_training_steps={request.steps}",
        f"trainer.test_freq={every}",
        *request.overrides,
    ]


def equivalent_command(request: Request, inputs: Inputs) -> str:
    """A command to paste: the same training, logged on the screen, with no checkpoint."""
    environment = [f"{key}={value}" for key, value in ENVIRONMENT.items()]
    head, tail = trainer_command(request.config_name, []), training_overrides(request, inputs)
    return " \\\n  ".join([" ".join([*environment, *map(shlex.quote, head)]), *map(shlex.quote, tail)])


def _train(run: Run, request: Request, inputs: Inputs, *, stall: float, console: Console) -> None:
    training = Training(
        config_name=request.config_name,
        overrides=tuple(training_overrides(request, inputs)),
        steps=request.steps,
        environment=ENVIRONMENT,
    )

    def screen(attempt: Attempt) -> _Screen:
        console.print()
        return _Screen(console, request, done=attempt.resumed_from or 0)

    train(run, training, stall=stall, screen=screen, tell=lambda text: note(console, "", text))


class _Screen:
    """The progress bar and the lines of the steps, as verl's file logger writes them."""

    def __init__(self, console: Console, request: Request, *, done: int) -> None:
        self._console = console
        self._request = request
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[remaining]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._done = done
        self._first_at: float | None = None
        self._stage = ""
        self._task = self._progress.add_task("", total=request.steps, completed=done, remaining="")

    def __enter__(self) -> _Screen:
        self._progress.start()
        self._enter("starting verl and Ray")
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def _enter(self, stage: str) -> None:
        if stage == self._stage:
            return
        self._stage = stage
        self._progress.update(self._task, description=stage)
        if not self._console.is_terminal:
            self._console.print(f"{stage} ...")

    def show(self, metrics: MetricsFile) -> bool:
        """Show what is new; say whether anything is."""
        if metrics.path.exists() and self._stage.startswith("starting"):
            self._enter("training" if self._done else "evaluating the start model")
            return True
        rows = metrics.new_rows()
        for step, values in rows:
            self._enter("training")
            view = StepView.of(step, values)
            if step > 0:
                self._progress.console.print(view.line(self._request.steps), markup=False)
                self._remaining(step)
            held_out = held_out_success(values)
            if held_out is not None:
                self._progress.console.print(_evaluation(step, held_out, self._request.n_test), style="bold")
        return bool(rows)

    def _remaining(self, step: int) -> None:
        now = time.monotonic()
        if self._first_at is None:
            self._first_at, self._done = now, step
        remaining = ""
        if step > self._done:
            seconds = (now - self._first_at) / (step - self._done) * (self._request.steps - step)
            remaining = f"about {_duration(seconds)} left"
        self._progress.update(self._task, completed=step, remaining=remaining)


def _evaluation(step: int, success: float, n_test: int) -> str:
    when = f"after step {step}" if step else "before training"
    return f"{when}: {100 * success:.1f} % of {n_test} held-out problems solved"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


# --- after training ------------------------------------------------------------------------------------------------


def _finish(run: Run, request: Request, inputs: Inputs, *, seconds: float, console: Console) -> None:
    from hpo_plugin.cli._plots import draw_curves, save_curves

    write_metrics(run, request.steps)
    rows = run.rows()
    name = ARM_NAMES.get(request.policy_loss, request.policy_loss)
    save_curves(
        rows,
        run.directory / PICTURE_NAME,
        title=f"{request.config_name}, {name}, seed {request.seed}",
        n_test=request.n_test,
    )
    command = equivalent_command(request, inputs)
    result = summarize(rows, request.n_test)
    run.finish({"request": request.as_json(), **result, "command": command})

    console.print()
    console.print(draw_curves(rows, width=console.width, color=console.is_terminal), markup=False, soft_wrap=True)
    console.print()
    console.print(_summary_table(result, request, seconds))
    console.print()
    # One line each, whatever the width, so that it can be copied.
    console.print(f"In {run.directory}:", markup=False, soft_wrap=True)
    for label, path in _written_files(run, result["steps"]):
        console.print(f"  {label:<12}{path}", markup=False, soft_wrap=True)
    console.print()
    console.print("The same training by verl alone:", style="dim")
    console.print(command, markup=False, soft_wrap=True)


def summarize(rows: Rows, n_test: int) -> dict[str, Any]:
    """The figures of the final table.

    Args:
        rows: All steps of a run.
        n_test: Held-out problems.

    Returns:
        ``success_before`` and ``success_after`` (shares), ``standard_error`` of the latter, ``steps``,
        ``training_seconds`` (evaluations not included), ``alpha`` (smallest, largest; None without hysteresis).

    Raises:
        TrainingError: The model was not evaluated before and after.
    """
    tested, views = evaluations(rows), step_views(rows)
    if not tested or tested[0][0] != 0 or tested[-1][0] != views[-1].step:
        raise TrainingError(f"evaluations at steps {[step for step, _ in tested]}: before or after is missing")
    before, after = tested[0][1], tested[-1][1]
    alphas = [view.alpha for view in views if view.alpha == view.alpha]
    return {
        "success_before": before,
        "success_after": after,
        "standard_error": (after * (1 - after) / n_test) ** 0.5,
        "steps": views[-1].step,
        "training_seconds": round(sum(view.seconds for view in views), 1),
        "alpha": [min(alphas), max(alphas)] if alphas else None,
    }


def _summary_table(result: dict[str, Any], request: Request, seconds: float) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    success = Text(f"{100 * result['success_before']:.1f} % → {100 * result['success_after']:.1f} %", style="bold")
    table.add_row("held-out success", success)
    table.add_row(
        "", f"{request.n_test} problems, one sample each; standard error {100 * result['standard_error']:.1f} %"
    )
    table.add_row(
        "steps",
        f"{result['steps']}, {_duration(result['training_seconds'])} of training; this call took {_duration(seconds)}",
    )
    if result["alpha"]:
        low, high = result["alpha"]
        table.add_row("α", f"{low:.2f} … {high:.2f}" if low != high else f"{low:.2f}")
    return table


def _written_files(run: Run, steps: int) -> list[tuple[str, Path]]:
    """What is where, within the run directory."""
    last = run.attempts()[-1]
    paths = {
        "curves": run.directory / PICTURE_NAME,
        "metrics": run.directory / "metrics.jsonl",
        "log": last.log,
        "config": last.directory / "hydra" / ".hydra" / "config.yaml",
        "checkpoint": run.checkpoints / f"global_step_{steps}",
    }
    return [(name, path.relative_to(run.directory)) for name, path in paths.items()]
