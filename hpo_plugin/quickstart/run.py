"""The steps of ``hpo-plugin quickstart``, in order. All training is verl's, under a public config."""

from __future__ import annotations

import os
import shlex
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from hpo_plugin.console import note
from hpo_plugin.quickstart.form import ENVIRONMENT, Inputs, data_options, start_model_config
from hpo_plugin.quickstart.inputs import make_inputs
from hpo_plugin.runs.directory import Attempt, Run, RunBusyError, RunRequest, choose_run
from hpo_plugin.runs.process import end_leftovers
from hpo_plugin.runs.training import Training, TrainingError, train, trainer_command, write_metrics
from hpo_plugin.runs.verl_log import (
    MetricsFile,
    Rows,
    StepView,
    evaluations,
    held_out_success,
    step_views,
)
from hpo_plugin.tasks.task import Task, laptop_form, load_task
from hpo_plugin.variants import VARIANTS

#: Evaluations, besides the one before training.
EVALUATIONS = 3
PICTURE_NAME = "curves.png"

#: Preset to name for people.
PRESET_TITLES = {variant.name: variant.title for variant in VARIANTS.values()} | {
    "grpo": "GRPO",
    "gspo": "GSPO",
    "sapo": "SAPO",
    "dapo": "DAPO",
    "dr_grpo": "Dr. GRPO",
    "cispo": "CISPO",
}


def run_quickstart(request: RunRequest, output: Path, *, new: bool, stall: float, console: Console) -> Run:
    """Make the inputs, check, train, and draw the curves.

    Args:
        request: What is asked for.
        output: Where runs, data and start models go.
        new: Whether to start another run where an unfinished one could be resumed.
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
    name = PRESET_TITLES.get(request.policy_loss, request.policy_loss)
    task = load_task(request.task)
    console.print(
        Text.assemble((f"{name} on {task.title}", "bold"), ", with verl's trainer on this machine's CPU cores")
    )
    try:
        run, resumed = choose_run(output, request, new=new)
        with run.locked():
            note(console, "run", f"{run.directory}{' (resumed)' if resumed else ''}")
            left = end_leftovers(run.processes)
            if left:
                note(console, "", f"stopped {left} processes that an earlier command left running")
            inputs = quickstart_inputs(task, request, output, logs=run.directory, console=console)
            training = training_of(task, request, inputs)
            _check(run, training, console, timeout=stall)
            _train(run, training, request, stall=stall, console=console)
            _finish(run, task.title, training, request, seconds=time.monotonic() - begin, console=console)
    except (RunBusyError, OSError, ValueError) as error:
        raise TrainingError(f"{type(error).__name__}: {error}") from error
    return run


# --- before training -----------------------------------------------------------------------------------------------


def quickstart_inputs(task: Task, request: RunRequest, output: Path, *, logs: Path, console: Console) -> Inputs:
    """Make the data and the start model of a request, or find them from an earlier call.

    Args:
        task: The task of the request.
        request: Its seed and ``n_test`` decide them.
        output: They go to ``data/`` and ``models/`` in it.
        logs: Directory for the log of verl's SFT trainer, where the task has such a stage.
        console: The console to show progress on.

    Raises:
        TrainingError: The SFT trainer failed.
        ValueError: The request cannot be met.
        OSError: A directory cannot be written, or holds something else.
    """
    key = f"{task.name}-seed{request.seed}-test{request.n_test}"
    sizes = {"test_size": request.n_test, "seed": request.seed}
    return make_inputs(
        task,
        data_options(task, {**laptop_form(task).quickstart, **sizes}),
        output / "data" / key,
        output / "models" / key,
        config=start_model_config(task, {}),
        seed=request.seed,
        logs=logs,
        console=console,
    )


def _check(run: Run, training: Training, console: Console, *, timeout: float) -> None:
    from hpo_plugin.check.checks import quiet, run_checks

    with quiet(run.directory / "check.log", console, "checking the installation and the config"):
        report = run_checks(training.config_name, training.overrides, timeout=timeout)
    if not report.ok:
        report.show(console)
        raise TrainingError("The checks failed. See the remedy below each failed check.")
    note(console, "check", f"{report.summary}; run `hpo-plugin check` to list them")


# --- training ------------------------------------------------------------------------------------------------------


def training_of(task: Task, request: RunRequest, inputs: Inputs) -> Training:
    """Return the training of a request: a public config, and what makes it this run.

    Args:
        task: The task of the request.
        request: Its preset, seed, steps, rollout and overrides.
        inputs: Data files and start model.
    """
    form = laptop_form(task)
    every = max(1, -(-request.steps // EVALUATIONS))
    overrides = [
        *form.overrides,
        f"algorithm.policy_loss={request.policy_loss}",
        f"hpo/cpu_rollout={request.rollout}",
        f"data.train_files={inputs.train_file}",
        f"data.val_files={inputs.test_file}",
        f"data.seed={request.seed}",
        f"actor_rollout_ref.model.path={inputs.model}",
        f"trainer.total_training_steps={request.steps}",
        f"trainer.test_freq={every}",
        *request.overrides,
    ]
    return Training(form.config_name, tuple(overrides), request.steps, environment=ENVIRONMENT)


def equivalent_command(training: Training) -> str:
    """Return a command to paste: the same training, logged on the screen, without a checkpoint."""
    environment = [f"{key}={value}" for key, value in training.environment.items()]
    head = trainer_command(training.config_name, [])
    words = [" ".join([*environment, *map(shlex.quote, head)]), *map(shlex.quote, training.overrides)]
    return " \\\n  ".join(words)


def _train(run: Run, training: Training, request: RunRequest, *, stall: float, console: Console) -> None:
    def screen(attempt: Attempt) -> _Screen:
        console.print()
        return _Screen(console, request, done=attempt.resumed_from or 0)

    train(run, training, stall=stall, screen=screen, tell=lambda text: note(console, "", text))


class _Screen:
    """The progress bar and the lines of the steps, as verl's file logger writes them."""

    def __init__(self, console: Console, request: RunRequest, *, done: int) -> None:
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


def _finish(run: Run, title: str, training: Training, request: RunRequest, *, seconds: float, console: Console) -> None:
    from hpo_plugin.runs.plots import draw_curves, save_curves

    write_metrics(run, request.steps)
    rows = run.rows()
    name = PRESET_TITLES.get(request.policy_loss, request.policy_loss)
    save_curves(
        rows,
        run.directory / PICTURE_NAME,
        title=f"{title}, {name}, seed {request.seed}",
        n_test=request.n_test,
    )
    command = equivalent_command(training)
    result = summarize(rows, request.n_test)
    run.finish({"request": request.as_json(), **result, "command": command})

    console.print()
    curves = draw_curves(rows, width=console.width, color=console.is_terminal)
    console.print(Text.from_ansi(curves), soft_wrap=True)
    console.print()
    console.print(_summary_table(result, request, seconds))
    console.print()
    # One line each, whatever the width, so that it can be copied.
    console.print(f"Files in {run.directory}:", markup=False, soft_wrap=True)
    for label, path in _written_files(run, result["steps"]):
        console.print(f"  {label:<12}{path}", markup=False, soft_wrap=True)
    console.print()
    console.print("The same training with verl's own command:", style="dim")
    console.print(command, markup=False, soft_wrap=True)


def summarize(rows: Rows, n_test: int) -> dict[str, Any]:
    """The figures of the final table.

    Args:
        rows: All steps of a run.
        n_test: Held-out problems.

    Returns:
        ``success_before`` and ``success_after`` (shares), ``standard_error`` of the latter, ``steps``,
        ``training_seconds`` (evaluations not included), ``alpha`` (smallest, largest; None for an algorithm without α).

    Raises:
        TrainingError: The model was not evaluated before and after.
    """
    tested, views = evaluations(rows), step_views(rows)
    if not tested or tested[0][0] != 0 or tested[-1][0] != views[-1].step:
        raise TrainingError(f"the evaluation before or after training is missing: steps {[step for step, _ in tested]}")
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


def _summary_table(result: dict[str, Any], request: RunRequest, seconds: float) -> Table:
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
        f"{result['steps']}, {_duration(result['training_seconds'])} of training; this command took "
        f"{_duration(seconds)}",
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
