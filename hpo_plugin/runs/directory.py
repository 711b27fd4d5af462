"""Run directories: selects the run to resume, and reads what an interrupted run has left."""

from __future__ import annotations

import fcntl
import json
import re
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

import hpo_plugin
from hpo_plugin.files import atomic_write
from hpo_plugin.runs.verl_log import Rows, merge_attempts, read_rows


class RunBusyError(RuntimeError):
    """Another process uses the run directory."""


@dataclass(frozen=True)
class RunRequest:
    """The arguments that identify a run. Calls with equal requests use the same run until it is finished.

    Attributes:
        policy_loss: ``algorithm.policy_loss``.
        seed: Seed of data, start model and sampling.
        steps: Number of training steps.
        rollout: ``hf`` or ``vllm``.
        n_test: Number of held-out problems.
        overrides: Additional Hydra overrides.
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
        """The request as JSON values, with the version of this package."""
        return {**asdict(self), "overrides": list(self.overrides), "hpo_plugin": hpo_plugin.__version__}

    @property
    def stem(self) -> str:
        """Name of the run directory without its number."""
        rollout = "" if self.rollout == "hf" else f"-{self.rollout}"
        return f"{Path(self.task).stem}_cpu-{self.policy_loss}{rollout}-seed{self.seed}"


@dataclass(frozen=True)
class Attempt:
    """One trainer process of a run.

    Attributes:
        directory: Directory with ``metrics.jsonl``, ``trainer.log``, and Hydra's copy of the config in ``hydra/``.
        resumed_from: Step of the checkpoint that the attempt resumed from; None if it started from the beginning.
    """

    directory: Path
    resumed_from: int | None

    @property
    def metrics(self) -> Path:
        """The file that verl's file logger writes."""
        return self.directory / "metrics.jsonl"

    @property
    def log(self) -> Path:
        """The file with all output of the trainer."""
        return self.directory / "trainer.log"


class Run:
    """One run directory."""

    def __init__(self, directory: Path) -> None:
        """Create a run object, without reading or writing files.

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
        """The file that identifies the running trainer's processes (``hpo_plugin.runs.process.end_leftovers``)."""
        return self.directory / "processes.json"

    @property
    def finished(self) -> bool:
        """Whether the final table was written."""
        return (self.directory / "result.json").exists()

    def request(self) -> dict[str, Any] | None:
        """The request of the run; None if the directory is not a run of this package."""
        try:
            request: dict[str, Any] = json.loads((self.directory / "request.json").read_bytes())
        except (OSError, ValueError):
            return None
        return request

    def attempts(self) -> list[Attempt]:
        """The attempts, in order."""
        found = []
        for path in sorted(self.directory.glob("attempt-*/attempt.json"), key=lambda p: _number(p.parent)):
            found.append(Attempt(path.parent, json.loads(path.read_bytes())["resumed_from"]))
        return found

    def rows(self) -> Rows:
        """The metrics of every completed step, each once."""
        return merge_attempts((attempt.resumed_from, read_rows(attempt.metrics)) for attempt in self.attempts())

    def missing_steps(self, last: int, first: int = 0) -> list[int]:
        """The steps from ``first`` to ``last`` whose metrics are not logged.

        Args:
            last: The last step of the training.
            first: 0, the evaluation before training, or 1 without such an evaluation.
        """
        rows = self.rows()
        return [step for step in range(first, last + 1) if step not in rows]

    def resume_step(self) -> int | None:
        """The newest complete checkpoint up to which all steps are logged.

        verl saves a step before it logs it. A run that is killed in between has a checkpoint of a step without metrics.
        The run then resumes from the checkpoint before it and repeats that step.

        Returns:
            The step; None to start from the beginning.
        """
        last = min(self._latest_checkpoint(), self.logged_steps())
        saved = self._saved()
        usable = [step for step, path in self._checkpoints() if step <= last and damage(path, *saved) is None]
        return max(usable, default=None)

    def logged_steps(self) -> int:
        """The number of steps from step 1 on that are logged without a gap."""
        rows, logged = self.rows(), 0
        while logged + 1 in rows:
            logged += 1
        return logged

    def damaged_checkpoints(self) -> dict[int, str]:
        """The checkpoints whose save verl has recorded but that cannot be loaded, and what is wrong with each."""
        latest = self._latest_checkpoint()
        saved = self._saved()
        found = {step: damage(path, *saved) for step, path in self._checkpoints() if step <= latest}
        return {step: what for step, what in found.items() if what is not None}

    def _checkpoints(self) -> list[tuple[int, Path]]:
        """The directories of checkpoints by ascending step; the newest ones may be incomplete."""
        return sorted(
            (int(path.name.removeprefix("global_step_")), path)
            for path in self.checkpoints.glob("global_step_*")
            if re.fullmatch(r"global_step_\d+", path.name)
        )

    def not_saved(self) -> list[str]:
        """What a resumed run needs and verl does not save, by ``save_contents``: of model, optimizer and extra."""
        contents, _ = self._saved()
        return [name for name in CHECKPOINT_FILES if name not in contents]

    def _saved(self) -> tuple[list[str], str]:
        """What verl saves, and the engine, by the config of the last attempt; verl's defaults without its copy."""
        config = self._config()
        contents = OmegaConf.select(config, "actor_rollout_ref.actor.checkpoint.save_contents")
        engine = OmegaConf.select(config, "actor_rollout_ref.actor.strategy", default="fsdp")
        return list(CHECKPOINT_FILES if contents is None else contents), str(engine)

    def _config(self) -> DictConfig | ListConfig:
        """Hydra's copy of the config of the last attempt that has one; empty without one."""
        for attempt in reversed(self.attempts()):
            copy = attempt.directory / "hydra" / ".hydra" / "config.yaml"
            if copy.exists():
                return OmegaConf.load(copy)
        return OmegaConf.create()

    @property
    def _tracker(self) -> Path:
        return self.checkpoints / "latest_checkpointed_iteration.txt"

    def _latest_checkpoint(self) -> int:
        """The step that verl recorded after its last complete save."""
        try:
            return int(self._tracker.read_text())
        except (FileNotFoundError, ValueError):
            # The trainer was killed before it wrote the file, for the first time or again. verl saves one checkpoint
            # after the other, so those before the newest are complete.
            return max((step for step, _ in self._checkpoints()[:-1]), default=0)

    def new_attempt(self, resumed_from: int | None) -> Attempt:
        """Create the directory of the next attempt, and invalidate checkpoints after the one that it resumes from.

        With ``trainer.max_actor_ckpt_to_keep``, it also removes older checkpoints: verl removes only those that its own
        process has saved.

        Args:
            resumed_from: See :class:`Attempt`.
        """
        self._remove_old_checkpoints(resumed_from or 0)
        number = max((_number(attempt.directory) for attempt in self.attempts()), default=0) + 1
        directory = self.directory / f"attempt-{number}"
        directory.mkdir(exist_ok=True)
        (self.directory / "failed.json").unlink(missing_ok=True)
        # A call that was killed at this point has left these files.
        for name in ("metrics.jsonl", "trainer.log"):
            (directory / name).unlink(missing_ok=True)
        # The attempt overwrites later checkpoints. Until verl records a new one, it may be half old and half new.
        if self._latest_checkpoint() > (resumed_from or 0):
            atomic_write(self._tracker, str(resumed_from or 0).encode())
        write_json(directory / "attempt.json", {"resumed_from": resumed_from})
        return Attempt(directory, resumed_from)

    def _remove_old_checkpoints(self, newest: int) -> None:
        """Remove checkpoints before ``newest``; with it, ``trainer.max_actor_ckpt_to_keep`` whole ones are left."""
        keep = OmegaConf.select(self._config(), "trainer.max_actor_ckpt_to_keep")
        if not isinstance(keep, int) or keep < 1:
            return
        saved = self._saved()
        older = [(step, path) for step, path in self._checkpoints() if step < newest]
        whole = [step for step, path in older if damage(path, *saved) is None]
        kept = whole[max(0, len(whole) - (keep - 1)) :]
        for step, path in older:
            if step not in kept:
                shutil.rmtree(path)

    def fail(self, text: str) -> None:
        """Record why the last attempt failed. The next attempt removes the record."""
        write_json(self.directory / "failed.json", {"error": text})

    @property
    def failure(self) -> str | None:
        """Why the last attempt failed; None if it did not fail or is still running."""
        try:
            return str(json.loads((self.directory / "failed.json").read_bytes())["error"])
        except FileNotFoundError:
            return None

    def result(self) -> dict[str, Any]:
        """The result that :meth:`finish` wrote."""
        result: dict[str, Any] = json.loads((self.directory / "result.json").read_bytes())
        return result

    def wall_seconds(self) -> float:
        """Total time of all attempts, with start-up and evaluations, from the modification times of their files."""
        spans = (
            max(file.stat().st_mtime for file in attempt.directory.iterdir())
            - (attempt.directory / "attempt.json").stat().st_mtime
            for attempt in self.attempts()
        )
        return sum(max(0.0, span) for span in spans)

    def finish(self, result: dict[str, Any]) -> None:
        """Write the result. Nothing changes the run afterwards."""
        write_json(self.directory / "result.json", result)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the directory for this process. The lock ends when the process ends.

        Raises:
            RunBusyError: Another process has the lock.
        """
        with (self.directory / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunBusyError(
                    f"another process uses {self.directory}; wait for it, or use another directory"
                ) from None
            yield

    def busy(self) -> bool:
        """Whether another process has locked this directory."""
        if not self.directory.exists():
            return False
        try:
            with self.locked():
                return False
        except RunBusyError:
            return True


def choose_run(output: Path, request: RunRequest, *, new: bool = False) -> tuple[Run, bool]:
    """Select an unfinished run to resume, or create a run directory.

    Args:
        output: Directory of all runs.
        request: The request.
        new: Whether to start a new run even if an unfinished one could be resumed.

    Returns:
        The run, and whether to resume it. A run is resumed if it is unfinished, has the same request, and no process
        uses it. Otherwise the run is a new directory with the next number.
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
            # Another call has just created it.
            number += 1
    write_json(directory / "request.json", request.as_json())
    return Run(directory), False


#: What the FSDP engine saves -> first part of the names of its files (``FSDPCheckpointManager.save_checkpoint``).
CHECKPOINT_FILES = {"model": "model", "optimizer": "optim", "extra": "extra_state"}


def damage(checkpoint: Path, contents: Sequence[str] = tuple(CHECKPOINT_FILES), engine: str = "fsdp") -> str | None:
    """What is missing from a checkpoint; None if it is whole.

    The engines FSDP and VeOmni write ``*.pt`` for each rank. The Megatron engine writes shards in ``model/``,
    ``optimizer/`` and ``extra/``, and a manifest at the end (``MegatronCheckpointManager._finalize_save``). TorchTitan
    uses ``torch.distributed.checkpoint``, which writes ``.metadata`` after all shards. The function reads only the end
    of each file ``*.pt``: ``torch.save`` writes a zip archive, whose directory is at the end, so a truncated file has
    none.

    Args:
        checkpoint: ``global_step_<N>``.
        contents: ``actor_rollout_ref.actor.checkpoint.save_contents``.
        engine: ``actor_rollout_ref.actor.strategy``.
    """
    actor, files = checkpoint / "actor", {checkpoint / "data.pt"}
    if engine == "torchtitan":
        shards = {path.parent for path in checkpoint.rglob("*.distcp")}
        if not shards:
            return "there is no file *.distcp"
        for folder in sorted(shards):
            if not (folder / ".metadata").exists():
                return f"{(folder / '.metadata').relative_to(checkpoint)} is missing"
    elif not (actor / "ckpt_contents.json").exists():
        found = list(actor.glob("*.pt"))
        if not found:
            return "actor/ has no file *.pt"
        sizes = {int(size) for path in found for size in re.findall(r"_world_size_(\d+)_rank_\d+\.pt$", path.name)}
        kinds = [kind for name, kind in CHECKPOINT_FILES.items() if name in contents]
        files |= {
            *found,
            *(actor / f"{kind}_world_size_{size}_rank_{r}.pt" for size in sizes for kind in kinds for r in range(size)),
        }
    files.update((checkpoint / "critic").glob("*.pt"))
    for file in sorted(files):
        if not file.exists():
            return f"{file.relative_to(checkpoint)} is missing"
        if not zipfile.is_zipfile(file):
            return f"{file.relative_to(checkpoint)} is truncated"
    return None


def _number(directory: Path) -> int:
    return int(directory.name.rpartition("-")[2])


def write_json(path: Path, value: object) -> None:
    """Write a JSON value to a file atomically."""
    atomic_write(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
