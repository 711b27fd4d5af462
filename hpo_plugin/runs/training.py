"""Trains a run to its last step, from the start or the last checkpoint, with verl's trainer as a child process.

:func:`train` waits for the end. :func:`train_in_turns` is a generator, so that one process can follow several
trainings.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import psutil

from hpo_plugin.check.cluster import SLOW_START
from hpo_plugin.console import listed
from hpo_plugin.files import atomic_write
from hpo_plugin.runs.directory import Attempt, Run
from hpo_plugin.runs.process import StalledError, Trainer, drive
from hpo_plugin.runs.verl_log import MetricsFile, died_workers, failure_cause, plain_lines

#: Environment of the trainer: full tracebacks and unbuffered lines in its log, and no usage statistics of Ray.
LOG_ENVIRONMENT = {"HYDRA_FULL_ERROR": "1", "PYTHONUNBUFFERED": "1", "RAY_USAGE_STATS_ENABLED": "0"}
#: Steps between checkpoints, which is also the maximum number of steps that an interruption loses.
SAVE_EVERY = 10
#: Maximum number of starts of the trainer if Ray starts too slowly.
STARTS = 3
TAIL_LINES = 15
#: Largest part of a trainer's log that is searched for the cause of a failure, in bytes.
SEARCHED_LOG = 64 << 20
#: Free space, in bytes, below which a file system is full.
FULL = 1 << 20
#: Packages whose versions the result of a run contains.
RECORDED_PACKAGES = ("hpo-plugin", "verl", "torch", "transformers", "ray")


class TrainingError(RuntimeError):
    """A training failed or could not be started. The message states the reason and what to do.

    Attributes:
        cause: The reason in one line, without what to do; empty if the message has no more details.
    """

    def __init__(self, text: str, cause: str = "") -> None:
        """Create the error.

        Args:
            text: The whole message.
            cause: See the class.
        """
        super().__init__(text)
        self.cause = cause


class TooFewStepsError(TrainingError):
    """verl ended without an error before the last step. Another attempt would end in the same way."""


@dataclass(frozen=True)
class Training:
    """The definition of a training.

    Attributes:
        config_name: Name of the trainer config.
        overrides: Overrides that define the training: algorithm, seed, steps, data, model. They take precedence over
            those of :func:`bookkeeping_overrides`.
        steps: ``trainer.total_training_steps``; None if verl derives the number from epochs and data.
        environment: Variables that the trainer needs in addition to the environment of this process.
        save_every: Steps between checkpoints.
        first_step: 0, the evaluation before training, or 1 without such an evaluation.
    """

    config_name: str
    overrides: tuple[str, ...]
    steps: int | None
    environment: Mapping[str, str] = field(default_factory=dict)
    save_every: int = SAVE_EVERY
    first_step: int = 0

    def done(self, run: Run) -> bool:
        """Whether the log of the run has every step of this training. False if the number of steps is not known."""
        return self.steps is not None and not run.missing_steps(self.steps, self.first_step)


class Screen(Protocol):
    """Displays an attempt."""

    def show(self, metrics: MetricsFile) -> bool:
        """Display the new metrics of the attempt. Return whether there are any."""


#: Opens the screen of an attempt for the duration of the training.
OpenScreen = Callable[[Attempt], contextlib.AbstractContextManager[Screen]]
#: Displays a progress line.
Tell = Callable[[str], None]
#: Decides whether to restart the trainer after a failed attempt. It may wait for resources.
Again = Callable[[Attempt, TrainingError], bool]


def train(
    run: Run, training: Training, *, stall: float, screen: OpenScreen, tell: Tell, again: Again | None = None
) -> None:
    """Train to the last step, resuming from the newest usable checkpoint. The caller has locked the run.

    Args:
        run: The run.
        training: The training.
        stall: Maximum time without progress, in seconds.
        screen: See :data:`OpenScreen`.
        tell: See :data:`Tell`.
        again: See :data:`Again`. By default, the trainer restarts only if Ray was too slow to start.

    Raises:
        TrainingError: The training failed; the message has the cause and the end of the log.
    """
    drive(train_in_turns(run, training, stall=stall, screen=screen, tell=tell, again=again))


def train_in_turns(
    run: Run, training: Training, *, stall: float, screen: OpenScreen, tell: Tell, again: Again | None = None
) -> Generator[None, None, None]:
    """The same as :func:`train`, as a generator. Closing the generator ends the trainer with all its processes."""
    again = again or _where_ray_was_slow(tell)
    while not training.done(run):
        step = run.resume_step()
        for damaged, what in run.damaged_checkpoints().items():
            if damaged > (step or 0):
                tell(f"the checkpoint of step {damaged} is not used: {what}")
        if step is None and (logged := run.logged_steps()):
            tell(f"there is no whole checkpoint, so steps 1 to {logged} are repeated")
        if step is not None and (lacks := run.not_saved()):
            tell(
                f"checkpoints have no state of {listed(lacks)}, which starts again: "
                "actor_rollout_ref.actor.checkpoint.save_contents"
            )
        attempt = run.new_attempt(step)
        try:
            yield from _train_once(run, attempt, training, stall=stall, screen=screen, tell=tell)
            return
        except TrainingError as error:
            if not again(attempt, error):
                raise


def _where_ray_was_slow(tell: Tell) -> Again:
    left = STARTS

    def again(attempt: Attempt, _error: TrainingError) -> bool:
        nonlocal left
        left -= 1
        if not left or SLOW_START not in attempt.log.read_text(encoding="utf-8", errors="replace"):
            return False
        tell("Ray did not start within 15 seconds, because the machine is busy; trying again")
        return True

    return again


def _train_once(
    run: Run, attempt: Attempt, training: Training, *, stall: float, screen: OpenScreen, tell: Tell
) -> Generator[None, None, None]:
    """Run one process of verl's trainer to its end."""
    overrides = attempt_overrides(run, attempt, training)
    environment = {
        **training.environment,
        **LOG_ENVIRONMENT,
        "VERL_FILE_LOGGER_PATH": str(attempt.metrics.resolve()),
    }
    command = trainer_command(training.config_name, overrides)
    shown = " ".join([*(f"{key}={shlex.quote(value)}" for key, value in environment.items()), shlex.join(command)])
    (attempt.directory / "command.sh").write_text(f"cd {shlex.quote(str(Path.cwd()))}\n{shown}\n", encoding="utf-8")
    tell(f"log: {attempt.log}")
    if attempt.resumed_from is not None:
        tell(f"resuming from the checkpoint of step {attempt.resumed_from}")
    with (
        screen(attempt) as shows,
        Trainer([sys.executable, *command[1:]], environment, log=attempt.log, record=run.processes) as trainer,
    ):
        metrics = MetricsFile(attempt.metrics)
        try:
            status = yield from trainer.turns(lambda: shows.show(metrics), stall=stall)
        except StalledError as error:
            raise _failure(attempt, f"The trainer was stopped: {error} (--stall).") from error
    if status != 0:
        raise _failure(attempt, why(status))
    if training.steps is not None and not training.done(run):
        reached = f"verl ended after step {run.logged_steps()} of {training.steps}"
        raise TooFewStepsError(
            f"{reached}, and without an error. Increase trainer.total_epochs, whose steps end the training as well, or "
            f"lower trainer.total_training_steps; trainer.val_only must be False. The log is {attempt.log}.",
            reached,
        )


def attempt_overrides(run: Run, attempt: Attempt, training: Training) -> list[str]:
    """All overrides of an attempt; of two for one key, the last takes precedence."""
    overrides = [*bookkeeping_overrides(run, attempt, training), *training.overrides]
    # verl would log this evaluation under the step of the checkpoint, whose metrics exist.
    return overrides if attempt.resumed_from is None else [*overrides, "trainer.val_before_train=False"]


def bookkeeping_overrides(run: Run, attempt: Attempt, training: Training) -> list[str]:
    """Overrides for the log, the copy of the config, the checkpoints and resuming. They do not change the training."""
    save_every = training.save_every if training.steps is None else min(training.save_every, training.steps)
    overrides = [
        "trainer.logger=[console,file]",
        f"trainer.experiment_name={run.directory.name}",
        f"trainer.default_local_dir={run.checkpoints.resolve()}",
        f"trainer.save_freq={save_every}",
        f"hydra.run.dir={attempt.directory.resolve() / 'hydra'}",
        # On a cluster, the process that logs can run on any node, with the environment of Ray on that node.
        f"++ray_kwargs.ray_init.runtime_env.env_vars.VERL_FILE_LOGGER_PATH={attempt.metrics.resolve()}",
    ]
    if attempt.resumed_from is None:
        return [*overrides, "trainer.resume_mode=disable"]
    return [
        *overrides,
        "trainer.resume_mode=resume_path",
        f"trainer.resume_from_path={run.checkpoints.resolve() / f'global_step_{attempt.resumed_from}'}",
    ]


def trainer_command(config_name: str, overrides: list[str]) -> list[str]:
    """The trainer's command for a shell in this directory, without environment variables."""
    return [python_for_shell(), "-m", "verl.trainer.main_ppo", f"--config-name={config_name}", *overrides]


def python_for_shell() -> str:
    """The name of this interpreter in a shell: ``python`` only if its environment is active."""
    found, own = shutil.which("python"), Path(sys.executable)
    if found is not None and Path(found).parent == own.parent:
        return "python"
    return str(own.relative_to(Path.cwd()) if own.is_relative_to(Path.cwd()) else own)


def write_metrics(run: Run, steps: int, first: int = 0) -> None:
    """Write ``metrics.jsonl`` of a run: every step of all attempts, each once.

    Args:
        run: The run.
        steps: The last step.
        first: See :meth:`Run.missing_steps`.

    Raises:
        TrainingError: A step is missing.
    """
    missing = run.missing_steps(steps, first)
    if missing:
        raise TrainingError(
            f"{run.directory}: the metrics of step {missing[0]} are missing; run the same command again"
        )
    lines = [json.dumps({"step": step, "data": dict(metrics)}) for step, metrics in run.rows().items()]
    atomic_write(run.directory / "metrics.jsonl", ("\n".join(lines) + "\n").encode())


def outcome(run: Run, steps: int) -> dict[str, Any]:
    """The number of steps, wall time, machine and versions of a finished run.

    Args:
        run: The run.
        steps: The last step.

    Returns:
        JSON values for :meth:`Run.finish`. The machine is that of this process.
    """
    return {
        "steps": steps,
        "wall_seconds": round(run.wall_seconds(), 1),
        "machine": {
            "system": platform.system(),
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "memory_gb": round(psutil.virtual_memory().total / 1e9),
            "python": platform.python_version(),
        },
        "versions": {name: _version(name) for name in RECORDED_PACKAGES},
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


# --- why it failed -------------------------------------------------------------------------------------------------


def why(status: int) -> str:
    """Describe the exit status of a failed trainer."""
    if status < 0:
        killed = ", often because it ran out of memory" if -status == signal.SIGKILL else ""
        return f"The trainer was killed by {signal.Signals(-status).name}{killed}."
    return f"The trainer failed (exit status {status})."


def failure(log: Path, what: str, advice: str) -> TrainingError:
    """Return the error for a failed trainer, with the cause and the end of its log."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - SEARCHED_LOG))
        text = file.read().decode("utf-8", errors="replace")
    lines = [line for line in plain_lines(text) if line]
    cause = failure_cause(lines)
    parts = [what]
    if cause:
        parts.append(f"Cause: {cause}")
    if died := died_workers(text):
        parts.append(f"Ray reports that these processes died: {', '.join(died)}")
        cause = cause or f"{died[0]} died"
    # torch.save does not say so: "[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534".
    if shutil.disk_usage(log.parent).free < FULL:
        parts.append(f"No space left on the file system of {log.parent}: free some space first.")
    parts += [f"The end of {log}:", *(f"  {line[:300]}" for line in lines[-TAIL_LINES:])]
    parts.append(advice)
    return TrainingError("\n".join(parts), cause or what)


def _failure(attempt: Attempt, what: str) -> TrainingError:
    return failure(attempt.log, what, "Run the same command again to resume from the last checkpoint.")
