"""One training, from its start or its last checkpoint to its last step, with verl's trainer as a process of its own.

:func:`train` does it and waits. :func:`train_in_turns` is the same as a generator, which gives the caller its turn
between two looks at the trainer, so that one process can follow several trainings.
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
from hpo_plugin.files import atomic_write
from hpo_plugin.runs.directory import Attempt, Run
from hpo_plugin.runs.process import StalledError, Trainer, drive
from hpo_plugin.runs.verl_log import MetricsFile, failure_cause, plain_lines

#: For a trainer's log: the whole traceback, and lines as they are printed.
LOG_ENVIRONMENT = {"HYDRA_FULL_ERROR": "1", "PYTHONUNBUFFERED": "1"}
#: Steps between checkpoints: an interruption costs at most so many.
SAVE_EVERY = 10
#: Starts of the trainer before giving up where Ray is too slow to come up.
STARTS = 3
TAIL_LINES = 15
#: Whose versions a finished run notes.
RECORDED_PACKAGES = ("hpo-plugin", "verl", "torch", "transformers", "ray")


class TrainingError(RuntimeError):
    """Why a training could not be made or finished, and what to do, for a person to read.

    Attributes:
        cause: In a line, without what to do; empty where the text says all.
    """

    def __init__(self, text: str, cause: str = "") -> None:
        """Keep both.

        Args:
            text: All of it.
            cause: See the class.
        """
        super().__init__(text)
        self.cause = cause


@dataclass(frozen=True)
class Training:
    """What is trained.

    Attributes:
        config_name: verl's or our config.
        overrides: What makes it this training: algorithm, seed, steps, data, model. They come last, so that they win
            over those of :func:`bookkeeping_overrides`.
        steps: ``trainer.total_training_steps``; None where verl derives it from epochs and data.
        environment: What the trainer needs beside this process's own environment.
        save_every: Steps between checkpoints.
        first_step: 0, the evaluation before training, or 1 where there is none.
    """

    config_name: str
    overrides: tuple[str, ...]
    steps: int | None
    environment: Mapping[str, str] = field(default_factory=dict)
    save_every: int = SAVE_EVERY
    first_step: int = 0

    def done(self, run: Run) -> bool:
        """Whether every step of this training is in the run's log. Without a number of steps that is never known."""
        return self.steps is not None and not run.missing_steps(self.steps, self.first_step)


class Screen(Protocol):
    """Where an attempt is shown."""

    def show(self, metrics: MetricsFile) -> bool:
        """Show what is new in the attempt's metrics; say whether anything is."""


#: Makes the screen of an attempt, which is open while it trains.
OpenScreen = Callable[[Attempt], contextlib.AbstractContextManager[Screen]]
#: Takes what a person should know, in a line.
Tell = Callable[[str], None]
#: Says whether to start the trainer again, after an attempt that failed; it may wait for what that needs.
Again = Callable[[Attempt, TrainingError], bool]


def train(
    run: Run, training: Training, *, stall: float, screen: OpenScreen, tell: Tell, again: Again | None = None
) -> None:
    """Train to the last step, resuming from the newest usable checkpoint. The caller holds the run's lock.

    Args:
        run: Its directory.
        training: What is trained.
        stall: Seconds without progress after which to give up.
        screen: See :data:`OpenScreen`.
        tell: See :data:`Tell`.
        again: See :data:`Again`; by default, where Ray was too slow to start.

    Raises:
        TrainingError: It failed; the text holds the cause and the end of the log.
    """
    drive(train_in_turns(run, training, stall=stall, screen=screen, tell=tell, again=again))


def train_in_turns(
    run: Run, training: Training, *, stall: float, screen: OpenScreen, tell: Tell, again: Again | None = None
) -> Generator[None, None, None]:
    """Do what :func:`train` does, a look at a time. Closing the generator ends the trainer with all its processes."""
    again = again or _where_ray_was_slow(tell)
    while not training.done(run):
        attempt = run.new_attempt(run.resume_step())
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
        tell("Ray did not start within its 15 seconds, so the machine is busy; trying again")
        return True

    return again


def _train_once(
    run: Run, attempt: Attempt, training: Training, *, stall: float, screen: OpenScreen, tell: Tell
) -> Generator[None, None, None]:
    """One process of verl's trainer, to its end."""
    overrides = [*bookkeeping_overrides(run, attempt, training), *training.overrides]
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
        tell(f"resumes after step {attempt.resumed_from}, from its checkpoint")
    with (
        screen(attempt) as shows,
        Trainer([sys.executable, *command[1:]], environment, log=attempt.log, record=run.processes) as trainer,
    ):
        metrics = MetricsFile(attempt.metrics)
        try:
            status = yield from trainer.turns(lambda: shows.show(metrics), stall=stall)
        except StalledError as error:
            raise _failure(attempt, f"The trainer was ended: {error} (--stall).") from error
    if status != 0 or (training.steps is not None and not training.done(run)):
        raise _failure(attempt, why(status))


def bookkeeping_overrides(run: Run, attempt: Attempt, training: Training) -> list[str]:
    """Where this run's log, config copy and checkpoints go, and where it resumes; nothing that changes the training."""
    save_every = training.save_every if training.steps is None else min(training.save_every, training.steps)
    overrides = [
        "trainer.logger=[console,file]",
        f"trainer.experiment_name={run.directory.name}",
        f"trainer.default_local_dir={run.checkpoints.resolve()}",
        f"trainer.save_freq={save_every}",
        f"hydra.run.dir={attempt.directory.resolve() / 'hydra'}",
        # On a cluster, the process that logs runs on any of the nodes, and its environment is that of the node's Ray.
        f"++ray_kwargs.ray_init.runtime_env.env_vars.VERL_FILE_LOGGER_PATH={attempt.metrics.resolve()}",
    ]
    if attempt.resumed_from is None:
        return [*overrides, "trainer.resume_mode=disable"]
    return [
        *overrides,
        "trainer.resume_mode=resume_path",
        f"trainer.resume_from_path={run.checkpoints.resolve() / f'global_step_{attempt.resumed_from}'}",
        # The step it resumes from was evaluated, or was not due.
        "trainer.val_before_train=False",
    ]


def trainer_command(config_name: str, overrides: list[str]) -> list[str]:
    """The command for a shell in this directory, without its environment."""
    return [python_for_shell(), "-m", "verl.trainer.main_ppo", f"--config-name={config_name}", *overrides]


def python_for_shell() -> str:
    """How the shell names this interpreter: ``python`` only where its environment is active."""
    found, own = shutil.which("python"), Path(sys.executable)
    if found is not None and Path(found).parent == own.parent:
        return "python"
    return str(own.relative_to(Path.cwd()) if own.is_relative_to(Path.cwd()) else own)


def write_metrics(run: Run, steps: int, first: int = 0) -> None:
    """Write ``metrics.jsonl`` of a run that has trained: every step of all attempts, each once.

    Args:
        run: Its directory.
        steps: The last step.
        first: See :meth:`Run.missing_steps`.

    Raises:
        TrainingError: A step is missing.
    """
    missing = run.missing_steps(steps, first)
    if missing:
        raise TrainingError(f"{run.directory}: the metrics of step {missing[0]} are missing")
    lines = [json.dumps({"step": step, "data": dict(metrics)}) for step, metrics in run.rows().items()]
    atomic_write(run.directory / "metrics.jsonl", ("\n".join(lines) + "\n").encode())


def outcome(run: Run, steps: int) -> dict[str, Any]:
    """What a finished run notes beside its metrics: how far it went, how long it took, and on what.

    Args:
        run: Its directory.
        steps: The last step.

    Returns:
        For :meth:`Run.finish`, as JSON values. The machine is this process's.
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
    """Say how a trainer ended that should not have."""
    if status < 0:
        killed = " (often: out of memory)" if -status == signal.SIGKILL else ""
        return f"The trainer was ended by {signal.Signals(-status).name}{killed}."
    return f"The trainer failed (exit status {status})."


def failure(log: Path, what: str, advice: str) -> TrainingError:
    """Return the error for a trainer that failed, with the cause and the end of its log."""
    lines = [line for line in plain_lines(log.read_text(encoding="utf-8", errors="replace")) if line]
    cause = failure_cause(lines)
    parts = [what]
    if cause:
        parts.append(f"Cause: {cause}")
    parts += [f"The end of {log}:", *(f"  {line[:300]}" for line in lines[-TAIL_LINES:])]
    parts.append(advice)
    return TrainingError("\n".join(parts), cause or what)


def _failure(attempt: Attempt, what: str) -> TrainingError:
    return failure(attempt.log, what, "The same command resumes from the last checkpoint.")
