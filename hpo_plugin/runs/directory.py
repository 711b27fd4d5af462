"""Run directories: which one a call of the quickstart continues, and what an interrupted run has left."""

from __future__ import annotations

import fcntl
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import hpo_plugin
from hpo_plugin.files import atomic_write
from hpo_plugin.runs.verl_log import Rows, merge_attempts, read_rows


class RunBusyError(RuntimeError):
    """Another process is at work in this run directory."""


@dataclass(frozen=True)
class RunRequest:
    """What was asked for. Two calls with equal requests mean the same run, as long as it is not finished.

    Attributes:
        policy_loss: ``algorithm.policy_loss``.
        seed: Of data, start model and sampling.
        steps: Training steps.
        rollout: ``hf`` or ``vllm``.
        n_test: Held-out problems.
        overrides: Further Hydra overrides.
        task: Name of the task, or the path of its file.
    """

    policy_loss: str
    seed: int
    steps: int
    rollout: str
    n_test: int
    overrides: tuple[str, ...] = ()
    task: str = "countdown"

    def as_json(self) -> dict[str, Any]:
        """JSON values, with the version that made them."""
        return {**asdict(self), "overrides": list(self.overrides), "hpo_plugin": hpo_plugin.__version__}

    @property
    def stem(self) -> str:
        """Name of the run directory, without its number."""
        rollout = "" if self.rollout == "hf" else f"-{self.rollout}"
        return f"{Path(self.task).stem}_cpu-{self.policy_loss}{rollout}-seed{self.seed}"


@dataclass(frozen=True)
class Attempt:
    """One process of training within a run.

    Attributes:
        directory: Its files: ``metrics.jsonl`` and ``trainer.log``, and Hydra's copy of the config in ``hydra/``.
        resumed_from: Step of the checkpoint it resumed from; None from the start.
    """

    directory: Path
    resumed_from: int | None

    @property
    def metrics(self) -> Path:
        """Written by verl's file logger."""
        return self.directory / "metrics.jsonl"

    @property
    def log(self) -> Path:
        """All output of the trainer."""
        return self.directory / "trainer.log"


class Run:
    """One run directory."""

    def __init__(self, directory: Path) -> None:
        """Name it; nothing is read or written.

        Args:
            directory: ``<output>/<stem>-<number>``.
        """
        self.directory = directory

    @property
    def checkpoints(self) -> Path:
        """``trainer.default_local_dir``."""
        return self.directory / "checkpoints"

    @property
    def processes(self) -> Path:
        """Names the trainer's processes while it runs: for ``hpo_plugin.runs.process.end_leftovers``."""
        return self.directory / "processes.json"

    @property
    def finished(self) -> bool:
        """Whether the final table was written."""
        return (self.directory / "result.json").exists()

    def request(self) -> dict[str, Any] | None:
        """What was asked for; None for a directory that is not a run of ours."""
        try:
            request: dict[str, Any] = json.loads((self.directory / "request.json").read_bytes())
        except (OSError, ValueError):
            return None
        return request

    def attempts(self) -> list[Attempt]:
        """In their order."""
        found = []
        for path in sorted(self.directory.glob("attempt-*/attempt.json"), key=lambda p: _number(p.parent)):
            found.append(Attempt(path.parent, json.loads(path.read_bytes())["resumed_from"]))
        return found

    def rows(self) -> Rows:
        """The metrics of every completed step, each once."""
        return merge_attempts((attempt.resumed_from, read_rows(attempt.metrics)) for attempt in self.attempts())

    def missing_steps(self, last: int, first: int = 0) -> list[int]:
        """The steps from the first to the last one whose metrics are not logged.

        Args:
            last: The last step of the training.
            first: 0, the evaluation before training, or 1 where there is none.
        """
        rows = self.rows()
        return [step for step in range(first, last + 1) if step not in rows]

    def resume_step(self) -> int | None:
        """The newest checkpoint that is complete and whose steps are all logged.

        verl saves a step before it logs it: a run killed in between has a checkpoint of a step whose metrics are lost.
        Resuming from the one before it does that step again.

        Returns:
            The step; None to start from the beginning.
        """
        rows = self.rows()
        latest = self._latest_checkpoint()
        logged = 0
        while logged + 1 in rows:
            logged += 1
        usable = [step for step in self._checkpoint_steps() if step <= min(latest, logged)]
        return max(usable, default=None)

    def _checkpoint_steps(self) -> list[int]:
        return sorted(
            int(path.parent.name.removeprefix("global_step_"))
            for path in self.checkpoints.glob("global_step_*/data.pt")
            if re.fullmatch(r"global_step_\d+", path.parent.name) and _holds_actor(path.parent / "actor")
        )

    @property
    def _tracker(self) -> Path:
        return self.checkpoints / "latest_checkpointed_iteration.txt"

    def _latest_checkpoint(self) -> int:
        """The step verl wrote down after its last complete save."""
        try:
            return int(self._tracker.read_text())
        except FileNotFoundError:
            return 0
        except ValueError:
            # Killed between opening and writing the file: the checkpoint before the newest is complete.
            return max(self._checkpoint_steps()[:-1], default=0)

    def new_attempt(self, resumed_from: int | None) -> Attempt:
        """Make the directory of the next attempt; checkpoints beyond the one it resumes from count no longer.

        Args:
            resumed_from: See :class:`Attempt`.
        """
        number = max((_number(attempt.directory) for attempt in self.attempts()), default=0) + 1
        directory = self.directory / f"attempt-{number}"
        directory.mkdir(exist_ok=True)
        (self.directory / "failed.json").unlink(missing_ok=True)
        # Left by a call that was killed right here.
        for name in ("metrics.jsonl", "trainer.log"):
            (directory / name).unlink(missing_ok=True)
        # The attempt writes them again: until verl says so, one that stands there may be half old and half new.
        if self._latest_checkpoint() > (resumed_from or 0):
            atomic_write(self._tracker, str(resumed_from or 0).encode())
        write_json(directory / "attempt.json", {"resumed_from": resumed_from})
        return Attempt(directory, resumed_from)

    def fail(self, text: str) -> None:
        """Note why the last attempt failed; the next attempt takes the note away."""
        write_json(self.directory / "failed.json", {"error": text})

    @property
    def failure(self) -> str | None:
        """Why the last attempt failed; None if it did not, or is still at it."""
        try:
            return str(json.loads((self.directory / "failed.json").read_bytes())["error"])
        except FileNotFoundError:
            return None

    def result(self) -> dict[str, Any]:
        """What :meth:`finish` was given."""
        result: dict[str, Any] = json.loads((self.directory / "result.json").read_bytes())
        return result

    def wall_seconds(self) -> float:
        """How long its attempts took together, start-up and evaluations included, by the times of their files."""
        spans = (
            max(file.stat().st_mtime for file in attempt.directory.iterdir())
            - (attempt.directory / "attempt.json").stat().st_mtime
            for attempt in self.attempts()
        )
        return sum(max(0.0, span) for span in spans)

    def finish(self, result: dict[str, Any]) -> None:
        """Write the result, after which the run is never touched again."""
        write_json(self.directory / "result.json", result)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only process at work in this directory; a process that dies, however, lets go.

        Raises:
            RunBusyError: Another process is.
        """
        with (self.directory / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunBusyError(f"{self.directory} is being worked on by another process") from None
            yield

    def busy(self) -> bool:
        """Whether another process is at work in this directory."""
        if not self.directory.exists():
            return False
        try:
            with self.locked():
                return False
        except RunBusyError:
            return True


def choose_run(output: Path, request: RunRequest, *, new: bool = False) -> tuple[Run, bool]:
    """Choose the directory of a call.

    Args:
        output: Where runs are.
        request: What is asked for.
        new: Whether to start another run even where an unfinished one could be resumed.

    Returns:
        The run, and whether it is resumed: an unfinished run with the same request that no process holds. Otherwise a
        new directory with the next number; finished runs and other requests' runs are never chosen.
    """
    output.mkdir(parents=True, exist_ok=True)
    existing = [
        path
        for path in output.iterdir()
        if path.is_dir() and re.fullmatch(rf"{re.escape(request.stem)}-\d+", path.name)
    ]
    if not new:
        for path in sorted(existing, key=_number, reverse=True):
            run = Run(path)
            if run.request() == request.as_json() and not run.finished and not run.busy():
                return run, True
    number = max(map(_number, existing), default=0) + 1
    while True:
        directory = output / f"{request.stem}-{number:03d}"
        try:
            directory.mkdir()
            break
        except FileExistsError:
            # Another call took it just now.
            number += 1
    write_json(directory / "request.json", request.as_json())
    return Run(directory), False


def _holds_actor(directory: Path) -> bool:
    """Whether a checkpoint's ``actor/`` was written, and not removed to make room.

    The FSDP engine writes ``*.pt`` for each rank; Megatron's writes a manifest after everything else
    (``MegatronCheckpointManager._finalize_save``), and shards in ``model/``, ``optimizer/`` and ``extra/``.
    """
    return (directory / "ckpt_contents.json").exists() or any(directory.glob("*.pt"))


def _number(directory: Path) -> int:
    return int(directory.name.rpartition("-")[2])


def write_json(path: Path, value: object) -> None:
    """Write a JSON value to a file, all of it or nothing."""
    atomic_write(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
