"""One training, from its start or its last checkpoint to its last step, with verl's trainer as a process of its own.

:func:`train` does it and waits. :func:`train_in_turns` is the same as a generator, which gives the caller its turn
between two looks at the trainer, so that one process can follow several trainings.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from hpo_plugin.cli._cluster import SLOW_START
from hpo_plugin.cli._runs import Attempt, Run
from hpo_plugin.cli._trainer import StalledError, Trainer, drive
from hpo_plugin.cli._verl_log import MetricsFile, failure_cause, plain_lines
from hpo_plugin.tasks._files import atomic_write

#: For a trainer's log: the whole traceback, and lines as they are printed.
LOG_ENVIRONMENT = {"HYDRA_FULL_ERROR": "1", "PYTHONUNBUFFERED": "1"}
#: Steps between checkpoints: an interruption costs at most so many.
SAVE_EVERY = 10
#: Starts of the trainer before giving up where Ray is too slow to come up.
STARTS = 3
TAIL_LINES = 15


class TrainingError(RuntimeError):
    """Why a training could not be made or finished, and what to do, for a person to read."""


@dataclass(frozen=True)
class Training:
    """What is trained.

    Attributes:
        config_name: verl's or our config.
        overrides: What makes it this training: arm, seed, steps, data, model. They come last, so that they win over
            those of :func:`bookkeeping_overrides`.
        steps: ``trainer.total_training_steps``.
        environment: What the trainer needs beside this process's own environment.
        save_every: Steps between checkpoints.
    """

    config_name: str
    overrides: tuple[str, ...]
    steps: int
    environment: Mapping[str, str] = field(default_factory=dict)
    save_every: int = SAVE_EVERY


class Screen(Protocol):
    """Where an attempt is shown."""

    def show(self, metrics: MetricsFile) -> bool:
        """Show what is new in the attempt's metrics; say whether anything is."""


#: Makes the screen of an attempt, which is open while it trains.
OpenScreen = Callable[[Attempt], contextlib.AbstractContextManager[Screen]]
#: Takes what a person should know, in a line.
Tell = Callable[[str], None]


def train(run: Run, training: Training, *, stall: float, screen: OpenScreen, tell: Tell) -> None:
    """Train to the last step, going on from the newest usable checkpoint. The caller holds the run's lock.

    Args:
        run: Its directory.
        training: What is trained.
        stall: Seconds without progress after which to give up.
        screen: See :data:`OpenScreen`.
        tell: See :data:`Tell`.

    Raises:
        TrainingError: It failed; the text holds the cause and the end of the log.
    """
    drive(train_in_turns(run, training, stall=stall, screen=screen, tell=tell))


def train_in_turns(
    run: Run, training: Training, *, stall: float, screen: OpenScreen, tell: Tell
) -> Generator[None, None, None]:
    """Do what :func:`train` does, a look at a time. Closing the generator ends the trainer with all its processes."""
    if not run.missing_steps(training.steps):
        return
    for left in reversed(range(STARTS)):
        attempt, status = yield from _train_once(run, training, stall=stall, screen=screen, tell=tell)
        if status == 0 and training.steps in run.rows():
            return
        if not left or SLOW_START not in attempt.log.read_text(encoding="utf-8", errors="replace"):
            raise _failure(attempt, why(status))
        tell("Ray did not start within its 15 seconds, so the machine is busy; trying again")


def _train_once(
    run: Run, training: Training, *, stall: float, screen: OpenScreen, tell: Tell
) -> Generator[None, None, tuple[Attempt, int]]:
    """One process of verl's trainer; returns what it left and its exit status."""
    resumed_from = run.resume_step()
    attempt = run.new_attempt(resumed_from)
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
    if resumed_from is not None:
        tell(f"goes on after step {resumed_from}, from its checkpoint")
    with (
        screen(attempt) as shows,
        Trainer([sys.executable, *command[1:]], environment, log=attempt.log, record=run.processes) as trainer,
    ):
        metrics = MetricsFile(attempt.metrics)
        try:
            status = yield from trainer.turns(lambda: shows.show(metrics), stall=stall)
        except StalledError as error:
            raise _failure(attempt, f"The trainer was ended: {error} (--stall).") from error
    return attempt, status


def bookkeeping_overrides(run: Run, attempt: Attempt, training: Training) -> list[str]:
    """Where this run's log, config copy and checkpoints go, and where it goes on; nothing that changes the training."""
    overrides = [
        "trainer.logger=[console,file]",
        f"trainer.experiment_name={run.directory.name}",
        f"trainer.default_local_dir={run.checkpoints.resolve()}",
        f"trainer.save_freq={min(training.save_every, training.steps)}",
        f"hydra.run.dir={attempt.directory.resolve() / 'hydra'}",
    ]
    if attempt.resumed_from is None:
        return [*overrides, "trainer.resume_mode=disable"]
    return [
        *overrides,
        "trainer.resume_mode=resume_path",
        f"trainer.resume_from_path={run.checkpoints.resolve() / f'global_step_{attempt.resumed_from}'}",
        # The step it goes on from was evaluated, or was not due.
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


def write_metrics(run: Run, steps: int) -> None:
    """Write ``metrics.jsonl`` of a run that has trained: every step of all attempts, each once.

    Args:
        run: Its directory.
        steps: The last step.

    Raises:
        TrainingError: A step is missing.
    """
    missing = run.missing_steps(steps)
    if missing:
        raise TrainingError(f"{run.directory}: the metrics of step {missing[0]} are missing")
    lines = [json.dumps({"step": step, "data": dict(metrics)}) for step, metrics in run.rows().items()]
    atomic_write(run.directory / "metrics.jsonl", ("\n".join(lines) + "\n").encode())


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
    return TrainingError("\n".join(parts))


def _failure(attempt: Attempt, what: str) -> TrainingError:
    return failure(attempt.log, what, "The same command goes on from the last checkpoint.")
