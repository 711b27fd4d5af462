"""Faults in training runs: SIGKILL of each process, full and damaged disks, bad rewards, corrupt data, lost nodes.

A subject is a command that a user types, with small sizes. A case starts it, injects one fault, and runs the same
command again until it succeeds. It then compares the run with an uninterrupted run of the same subject, the reference.
The reference, the data and the start model of each subject are made once, in ``runs/faults``; remove that directory
after a change of the training.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from hpo_plugin.files import atomic_write
from hpo_plugin.quickstart.form import ENVIRONMENT
from hpo_plugin.quickstart.sft import ONE_RANK
from hpo_plugin.runs.training import LOG_ENVIRONMENT
from torture.probe import Probe, Result, seeded

ROOT = Path(__file__).resolve().parents[1]
#: References, data and start models, which all cases share.
SHARED = ROOT / "runs" / "faults"
#: Maximum time of one command, in seconds.
LIMIT = 900.0
#: Maximum number of commands until a run is finished.
COMMANDS = 3
#: Seconds in which the processes of an ended command have to end.
GONE = 30.0
#: ``--stall`` of the quickstart, in seconds.
STALL = 300.0
SEED = 1
STEPS = 8
SAVE_EVERY = 2
#: Values of a step that do not depend on timing.
COMPARED = (
    "actor/hpo/alpha",
    "actor/hpo/share_positive",
    "actor/hpo/share_negative",
    "critic/rewards/mean",
    "prompt_length/mean",
    "response_length/mean",
)
#: Smallest α of A-HPO.
ALPHA_MIN = 0.1
#: One of these is in the output of a command that stopped.
CAUSE = re.compile(r"^Cause: \S|killed by SIGKILL|was stopped: |these nodes have died: ", re.MULTILINE)

Rows = dict[int, dict[str, Any]]
#: A fault, as a context manager of the work directory of a run.
FaultOf = Callable[[Path], contextlib.AbstractContextManager[None]]


@dataclass(frozen=True)
class Subject:
    """A command, and how to read what it has written to its work directory.

    Attributes:
        name: Name of its directory in :data:`SHARED`.
        steps: The steps of a finished run.
        command: Arguments, and additional environment variables, from the work directory.
        marks: Globs below the work directory. The command appends lines to these files; their number is its progress.
        roles: Role to a pattern of the command line of its processes. The role ``launcher`` is the command itself.
        inputs: Directories that all cases copy from the reference.
        rows: The metrics of a finished run, in order.
        compared: Metrics that have to be equal to those of the reference.
        alpha: Names of the metrics α, p̂⁺ and p̂⁻; empty without α.
        last_whole: The step that an interrupted run has to resume from; None for the start.
        resumes: The steps that the processes of the run have resumed from, in order; None for the start.
        incomplete: What is missing from a finished run, besides its metrics.
        prepare: Makes the inputs in the directory of the reference, where the command does not.
    """

    name: str
    steps: range
    command: Callable[[Path], tuple[list[str], dict[str, str]]]
    marks: tuple[str, ...]
    roles: Mapping[str, str]
    inputs: tuple[str, ...]
    rows: Callable[[Path], list[tuple[int, dict[str, Any]]]]
    compared: tuple[str, ...]
    alpha: tuple[str, str, str] | tuple[()]
    last_whole: Callable[[Path], int | None]
    resumes: Callable[[Path], list[int | None]]
    incomplete: Callable[[Path], list[str]]
    prepare: Callable[[Path], None] = lambda folder: None


# --- commands ------------------------------------------------------------------------------------------------------


class Command:
    """A command in a session of its own, with its output in a file."""

    def __init__(self, arguments: Sequence[str], work: Path, environment: Mapping[str, str] = {}) -> None:
        """Start it.

        Args:
            arguments: Program and arguments.
            work: Work directory; the output is appended to ``output.log`` in it.
            environment: Additional environment variables.
        """
        self.log = work / "output.log"
        self._from = self.log.stat().st_size if self.log.exists() else 0
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                arguments,
                cwd=work,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "COLUMNS": "300"} | dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._root = psutil.Process(self.process.pid)
        self._sessions = {self.process.pid}

    def members(self) -> list[psutil.Process]:
        """The command and its descendants. Their sessions are remembered."""
        try:
            found = [self._root, *self._root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []
        for process in found:
            with contextlib.suppress(OSError):
                self._sessions.add(os.getsid(process.pid))
        return found

    def find(self, pattern: str) -> list[psutil.Process]:
        """The processes whose command line matches a pattern."""
        found = []
        for process in self.members():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if re.search(pattern, " ".join(process.cmdline())):
                    found.append(process)
        return found

    def running(self) -> bool:
        """Whether the command has not ended."""
        return self.process.poll() is None

    def wait(self, limit: float = LIMIT) -> int | None:
        """Wait for the end; return the exit status, or None after the time limit."""
        deadline = time.monotonic() + limit
        while self.running():
            if time.monotonic() > deadline:
                return None
            self.members()
            time.sleep(0.5)
        return self.process.returncode

    def output(self) -> str:
        """The output of this command."""
        with self.log.open("rb") as file:
            file.seek(self._from)
            return file.read().decode(errors="replace")

    def left(self) -> list[psutil.Process]:
        """The living processes of its sessions."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.NoSuchProcess):
                if os.getsid(process.pid) in self._sessions and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def kill(self) -> None:
        """End the command and its sessions."""
        self.members()
        deadline = time.monotonic() + GONE
        while (left := self.left()) and time.monotonic() < deadline:
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self.process.poll()
            time.sleep(0.1)
        self.process.wait()


@contextlib.contextmanager
def started(subject: Subject, work: Path) -> Iterator[Command]:
    """Start the command of a subject; none of its processes is left at the end."""
    arguments, environment = subject.command(work)
    command = Command(arguments, work, environment)
    try:
        yield command
    finally:
        command.kill()


# --- what a run has written ----------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The rows of a metrics file, in order; a last line without its end is not a row."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [(int(row["step"]), row["data"]) for row in map(json.loads, lines)]


def can_load(files: Sequence[Path]) -> bool:
    """Whether torch can load files."""
    for file in files:
        try:
            # The probe wrote the checkpoint.
            torch.load(file, map_location="cpu", weights_only=False)  # nosec B614
        except Exception:
            return False
    return True


def attempts(work: Path) -> list[Path]:
    """The directories of the attempts of a run, in order."""
    return sorted(work.glob("runs/*-001/attempt-*"), key=lambda path: int(path.name.rpartition("-")[2]))


def attempt_rows(work: Path) -> set[int]:
    """The steps that are logged by an attempt of a run."""
    return {step for attempt in attempts(work) for step, _ in read_rows(attempt / "metrics.jsonl")}


def checkpoints(work: Path) -> list[Path]:
    """The directories of a run's checkpoints by ascending step."""
    found = work.glob("runs/*-001/checkpoints/global_step_*")
    return sorted(found, key=lambda path: int(path.name.rpartition("_")[2]))


def is_whole(checkpoint: Path) -> bool:
    """Whether torch can load every file of a checkpoint: model, optimizer, extra state and data loader."""
    files = [*checkpoint.glob("actor/*.pt"), *checkpoint.glob("data.pt")]
    kinds = {file.name.partition("_world_size")[0] for file in files}
    return kinds == {"model", "optim", "extra_state", "data.pt"} and can_load(files)


def last_whole_of_verl(work: Path) -> int | None:
    """The newest whole checkpoint whose step is logged. It is the one to resume from after a single fault."""
    logged = attempt_rows(work)
    for checkpoint in reversed(checkpoints(work)):
        step = int(checkpoint.name.rpartition("_")[2])
        if step in logged and is_whole(checkpoint):
            return step
    return None


def resumes_of_verl(work: Path) -> list[int | None]:
    """The step of the checkpoint that each attempt started from."""
    files = [attempt / "attempt.json" for attempt in attempts(work)]
    return [json.loads(file.read_bytes())["resumed_from"] for file in files if file.exists()]


def incomplete_run_of_verl(work: Path) -> list[str]:
    """What is missing from the files of a finished run."""
    (run,) = work.glob("runs/*-001")
    wrong = []
    if json.loads((run / "result.json").read_bytes())["steps"] != STEPS:
        wrong.append("result.json has another number of steps")
    if not (run / "checkpoints" / f"global_step_{STEPS}").exists() or not is_whole(checkpoints(work)[-1]):
        wrong.append("the checkpoint of the last step is not whole")
    return wrong


def rows_of_verl(work: Path) -> list[tuple[int, dict[str, Any]]]:
    """The merged metrics of a finished run."""
    (file,) = work.glob("runs/*-001/metrics.jsonl")
    return read_rows(file)


def marks(subject: Subject, work: Path) -> int:
    """How many lines the command has written to the files that measure its progress."""
    return sum(path.read_bytes().count(b"\n") for glob in subject.marks for path in work.glob(glob))


def clipped_ratio(positive: float, negative: float) -> float:
    """α of A-HPO from the shares of positive and negative advantages."""
    return 1.0 if negative == 0 else min(1.0, max(ALPHA_MIN, positive / negative))


# --- the reference -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """An uninterrupted run.

    Attributes:
        times: Seconds from the start to each mark.
        seconds: Seconds of the whole command.
        rows: The rows of its metrics.
        folder: Its work directory.
    """

    times: list[float]
    seconds: float
    rows: Rows
    folder: Path

    def moment(self, rng: random.Random, *, whole: bool) -> tuple[int, float]:
        """A moment that is uniformly distributed over the run.

        Args:
            rng: Random numbers.
            whole: Whether to include the time after the last mark.

        Returns:
            The number of marks before the moment, and the seconds after the last one. A run on a slower machine has the
            same phase at this moment.
        """
        at = rng.uniform(0, self.seconds if whole else self.times[-1])
        before = [time for time in self.times if time <= at]
        return len(before), at - (before[-1] if before else 0.0)


def reference(subject: Subject) -> Reference:
    """The reference of a subject, which is made if it does not exist."""
    folder = SHARED / subject.name
    path = folder / "reference.json"
    if not path.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        subject.prepare(folder)
        times: list[float] = []
        begin = time.monotonic()
        with started(subject, folder) as command:
            while command.running():
                new = marks(subject, folder) - len(times)
                times += [time.monotonic() - begin] * new
                time.sleep(0.05)
            if command.process.returncode != 0:
                raise RuntimeError(f"the reference of {subject.name} failed:\n{command.output()[-3000:]}")
        rows = dict(subject.rows(folder))
        found = {"times": times, "seconds": time.monotonic() - begin, "rows": rows}
        atomic_write(path, json.dumps(found).encode())
    found = json.loads(path.read_bytes())
    rows = {int(step): row for step, row in found["rows"].items()}
    return Reference(found["times"], found["seconds"], rows, folder)


def copy_inputs(subject: Subject, work: Path) -> Reference:
    """Copy data and start model of the reference to a work directory."""
    made = reference(subject)
    for name in subject.inputs:
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        if (made.folder / name).is_dir():
            shutil.copytree(made.folder / name, work / name)
        else:
            shutil.copy(made.folder / name, work / name)
    return made


# --- the checks ----------------------------------------------------------------------------------------------------


def check_rows(subject: Subject, rows: list[tuple[int, dict[str, Any]]], uninterrupted: Rows) -> list[str]:
    """Compare the metrics of a finished run with those of the uninterrupted one.

    Args:
        subject: The subject.
        rows: The metrics of the run, in order.
        uninterrupted: The rows of the reference.

    Returns:
        What is wrong.
    """
    wrong = []
    steps = [step for step, _ in rows]
    if steps != list(subject.steps):
        wrong.append(f"the metrics have the steps {steps}")
    for step, row in rows:
        for name in subject.compared:
            found, expected = row.get(name), uninterrupted.get(step, {}).get(name)
            if found != expected:
                wrong.append(f"step {step}: {name} is {found}, and {expected} without the fault")
        if subject.alpha and subject.alpha[0] in row:
            found, positive, negative = (row[name] for name in subject.alpha)
            if not math.isclose(found, clipped_ratio(positive, negative), rel_tol=1e-6):
                wrong.append(f"step {step}: α is {found}, with p̂⁺ = {positive} and p̂⁻ = {negative}")
    return wrong


def check_end(subject: Subject, work: Path, made: Reference) -> list[str]:
    """Check a finished run: its metrics and its files."""
    return [*check_rows(subject, subject.rows(work), made.rows), *subject.incomplete(work)]


def still_there(command: Command) -> list[str]:
    """The processes that a command has left, after some time to end."""
    deadline = time.monotonic() + GONE
    while (left := command.left()) and time.monotonic() < deadline:
        time.sleep(0.5)
    names = []
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            names.append(" ".join(process.cmdline())[:80])
    return names


def finish(subject: Subject, work: Path, made: Reference, result: Result, say: Callable[[str], None]) -> None:
    """Run the command again until the run is finished, and check it."""
    for _ in range(COMMANDS):
        expected, known = subject.last_whole(work), len(subject.resumes(work))
        begin = time.monotonic()
        with started(subject, work) as command:
            status = command.wait()
            output = command.output()
            if status is not None:
                for name in still_there(command):
                    say(f"still runs after the end of the command: {name}")
        result.measure("longest resumed command (s)", round(time.monotonic() - begin, 1))
        new = subject.resumes(work)[known:]
        if new and new[0] != expected:
            say(f"resumed from {new[0]}, but the last whole checkpoint is {expected}")
        result.count("commands after the fault")
        if status == 0:
            break
        if status is None:
            say(f"the command did not end within {LIMIT:g} s\n{output[-2000:]}")
            return
        if not CAUSE.search(output):
            say(f"stopped without a cause (exit status {status})\n{output[-2000:]}")
    else:
        say(f"not finished after {COMMANDS} more commands\n{output[-2000:]}")
        return
    for line in check_end(subject, work, made):
        say(line)


# --- SIGKILL -------------------------------------------------------------------------------------------------------


def wait_for_marks(subject: Subject, work: Path, command: Command, number: int, limit: float = LIMIT) -> bool:
    """Wait until a command has made some progress; False if it ended before."""
    deadline = time.monotonic() + limit
    while marks(subject, work) < number:
        if not command.running() or time.monotonic() > deadline:
            return False
        command.members()
        time.sleep(0.05)
    return True


def kill_one(command: Command, pattern: str | None, rng: random.Random, limit: float = LIMIT) -> str | None:
    """SIGKILL for a process; for the command itself without a pattern.

    Waits until there is such a process.

    Returns:
        Its command line; None if the command ended before there was one.
    """
    deadline = time.monotonic() + limit
    while command.running() and time.monotonic() < deadline:
        found = command.find(pattern) if pattern else [psutil.Process(command.process.pid)]
        with contextlib.suppress(psutil.NoSuchProcess, IndexError):
            chosen = rng.choice(found)
            name = " ".join(chosen.cmdline())[:80]
            chosen.kill()
            return name
        time.sleep(0.05)
    return None


def kill_case(subject: Subject, role: str, seed: int, work: Path) -> Result:
    """Kill a process at a random moment, resume the run, and check it."""
    result = Result(inputs=1)
    made = copy_inputs(subject, work)
    rng = random.Random(f"{subject.name}/{role}/{seed}")
    pattern = subject.roles[role] if role != "launcher" else None
    number, delay = made.moment(rng, whole=pattern is None)

    def say(text: str) -> None:
        result.failures.append(f"{subject.name}, {role}, seed {seed}, {delay:.1f} s after mark {number}: {text}")

    begin = time.monotonic()
    with started(subject, work) as command:
        if wait_for_marks(subject, work, command, number):
            deadline = time.monotonic() + delay
            # A run that is faster than the reference is killed at the next mark.
            while command.running() and time.monotonic() < deadline and marks(subject, work) <= number:
                command.members()
                time.sleep(0.02)
        name = kill_one(command, pattern, rng)
        if name is None:
            say(f"the command ended before the fault (exit status {command.wait()})\n{command.output()[-2000:]}")
            return result
        struck = time.monotonic()
        result.count("SIGKILLs")
        status = command.wait()
        output = command.output()
        result.measure("longest time from SIGKILL to the end (s)", round(time.monotonic() - struck, 1))
        if status is None:
            say(f"{name} was killed, and the command did not end within {LIMIT:g} s\n{output[-2000:]}")
            return result
        if pattern is not None:
            for left in still_there(command):
                say(f"still runs after the end of the command: {left}")
        print(f"killed {name}; exit status {status} {time.monotonic() - begin:.0f} s\n{output}", flush=True)
        if status != 0 and pattern is not None and not CAUSE.search(output):
            say(f"{name} was killed, and the command stopped without a cause\n{output[-2000:]}")
    if status == 0:
        result.count("runs that continued")
        for line in check_end(subject, work, made):
            say(line)
    else:
        result.count("runs that stopped and were resumed")
        finish(subject, work, made, result, say)
    return result


# --- other faults --------------------------------------------------------------------------------------------------


def wait_for_step(work: Path, command: Command, step: int, limit: float = LIMIT) -> bool:
    """Wait until a step is logged; False if the command ended before."""
    deadline = time.monotonic() + limit
    while step not in attempt_rows(work):
        if not command.running() or time.monotonic() > deadline:
            return False
        command.members()
        time.sleep(0.05)
    return True


def during(subject: Subject, fault: FaultOf, said: str | None, work: Path, step: int = 3) -> Result:
    """Inject a fault after a step, undo it when the command has stopped, resume the run, and check it.

    Args:
        subject: The subject.
        fault: The fault, as a context manager of the work directory.
        said: Pattern of the output of the command; None if the command has to finish the run with the fault.
        work: The work directory.
        step: The fault is injected when this step is logged; 0 for the start of the command.
    """
    result = Result(inputs=1)
    made, say = copy_inputs(subject, work), result.failures.append
    with contextlib.ExitStack() as stack:
        if step == 0:
            stack.enter_context(fault(work))
        with started(subject, work) as command:
            if step > 0:
                if not wait_for_step(work, command, step):
                    say(f"the command did not reach step {step}\n{command.output()[-2000:]}")
                    return result
                stack.enter_context(fault(work))
            status = command.wait()
            output = command.output()
        print(f"exit status {status}\n{output}", flush=True)
        if status is None:
            say(f"the command did not end within {LIMIT:g} s\n{output[-2000:]}")
            return result
        if said is None:
            if status != 0:
                say(f"the command stopped (exit status {status})\n{output[-2000:]}")
                return result
            result.count("runs that continued")
            result.failures += check_end(subject, work, made)
            return result
        if status == 0:
            say("the command finished the run with the fault")
        if not re.search(said, output):
            say(f"the output does not contain {said}\n{output[-2000:]}")
    result.count("runs that stopped and were resumed")
    finish(subject, work, made, result, say)
    return result


def after_kill(
    subject: Subject, change: Callable[[Path], None], said: str | None, expected: int | None, work: Path, step: int = 5
) -> Result:
    """Kill the command after a step, change its files, resume the run, and check it.

    Args:
        subject: The subject.
        change: What happens to the files in the work directory.
        said: Pattern of the output of the resumed command.
        expected: The step that the run has to resume from; None for the start.
        work: The work directory.
        step: The command is killed when this step is logged.
    """
    result = Result(inputs=1)
    made, say = copy_inputs(subject, work), result.failures.append
    with started(subject, work) as command:
        if not wait_for_step(work, command, step):
            say(f"the command did not reach step {step}\n{command.output()[-2000:]}")
            return result
        kill_one(command, None, random.Random(0))
        command.wait()
        result.count("SIGKILLs")
    change(work)
    result.count("runs that stopped and were resumed")
    finish(dataclasses.replace(subject, last_whole=lambda work: expected), work, made, result, say)
    text = command.output()
    print(text, flush=True)
    if said is not None and not re.search(said, text):
        say(f"the output does not contain {said}\n{text[-3000:]}")
    return result


@contextlib.contextmanager
def bad_reward(kind: str, work: Path) -> Iterator[None]:
    """A reward function that raises, hangs or returns NaN."""
    path = work / "fault"
    path.write_text(kind)
    yield
    path.unlink()


def truncate(name: str, keep: float, work: Path) -> None:
    """Truncate a file of the newest checkpoint to a share of its size."""
    path = checkpoints(work)[-1] / name
    os.truncate(path, int(path.stat().st_size * keep))


def remove(name: str, work: Path) -> None:
    """Remove a file of the newest checkpoint."""
    (checkpoints(work)[-1] / name).unlink()


def tracker(text: str | None, work: Path) -> None:
    """Write other text to verl's ``latest_checkpointed_iteration.txt``, or remove it."""
    path = checkpoints(work)[-1].parent / "latest_checkpointed_iteration.txt"
    if text is None:
        path.unlink()
    else:
        path.write_text(text)


def remove_all(work: Path) -> None:
    """Remove the directory of all checkpoints."""
    shutil.rmtree(checkpoints(work)[-1].parent)


@contextlib.contextmanager
def vanished(work: Path) -> Iterator[None]:
    """Remove the directory of all checkpoints while the run uses it."""
    remove_all(work)
    yield


@contextlib.contextmanager
def read_only(work: Path) -> Iterator[None]:
    """Make the directory of the checkpoints read-only, by a bind mount: root may write to any directory."""
    path = str(checkpoints(work)[-1].parent)
    with mounted("--bind", path, path):
        mount("-o", "remount,bind,ro", path)
        yield


def mount(*arguments: str) -> None:
    """Run ``mount``; the error states that the fault needs root."""
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(f"this fault needs root, to run `mount {' '.join(arguments)}`: {done.stderr.strip()}")


@contextlib.contextmanager
def mounted(*arguments: str) -> Iterator[None]:
    """A mount, whose last argument is the directory."""
    mount(*arguments)
    try:
        yield
    finally:
        # Also where a process still uses the directory.
        subprocess.run(["umount", "--lazy", arguments[-1]], check=True, capture_output=True)


@contextlib.contextmanager
def full(work: Path) -> Iterator[None]:
    """Use all space of the file system of the run, except for 64 KiB."""
    filler = work / "runs" / "filler"
    free = shutil.disk_usage(work / "runs").free
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, free - 65_536))
    yield
    filler.unlink()


def disk_full(work: Path) -> Result:
    """Fill the disk of a run, which is a file system of 256 MiB in memory."""
    runs = work / "runs"
    runs.mkdir()
    with mounted("-t", "tmpfs", "-o", "size=256m", "none", str(runs)):
        return during(COUNTDOWN, full, "No space left on", work)


@contextlib.contextmanager
def corrupt_row_group(work: Path) -> Iterator[None]:
    """Overwrite a row group of the training data; the file's footer stays."""
    import pyarrow.parquet as pq

    data = work / "data.parquet"
    (file,) = (work / "runs" / "data").glob("*/train.parquet")
    pq.write_table(pq.read_table(file), data, row_group_size=512)
    whole = data.read_bytes()
    column = pq.read_metadata(data).row_group(1).column(0)
    begin = column.dictionary_page_offset or column.data_page_offset
    data.write_bytes(
        whole[:begin] + b"\xff" * column.total_compressed_size + whole[begin + column.total_compressed_size :]
    )
    yield
    data.write_bytes(whole)


# --- the subjects --------------------------------------------------------------------------------------------------

#: A reward that a quarter of random texts gets, and that misbehaves while a file ``fault`` exists beside it.
REWARD = """
import time
from pathlib import Path

FAULT = Path(__file__).with_name("fault")


def compute_score(solution_str, **other):
    fault = FAULT.read_text() if FAULT.exists() else ""
    if fault == "raise":
        raise RuntimeError("this reward fails on purpose")
    if fault == "hang":
        time.sleep(100_000)
    if fault == "nan":
        return float("nan")
    return float(sum(map(ord, solution_str)) % 4 == 0)
"""


def quickstart(task: str, *overrides: str) -> Callable[[Path], tuple[list[str], dict[str, str]]]:
    """The command of ``hpo-plugin quickstart`` with small sizes, in a work directory."""

    def command(work: Path) -> tuple[list[str], dict[str, str]]:
        (work / "reward.py").write_text(REWARD)
        arguments = [
            *[sys.executable, "-m", "torture.small_quickstart", "quickstart", f"--task={task}"],
            *[f"--steps={STEPS}", "--n-test=16", f"--seed={SEED}", f"--stall={STALL:g}", f"--output={work / 'runs'}"],
            *[f"trainer.save_freq={SAVE_EVERY}", "data.train_batch_size=8"],
            "actor_rollout_ref.actor.ppo_mini_batch_size=4",
            # Four steps are an epoch, so that a run passes the ends of two.
            "data.train_max_samples=32",
            f"reward.custom_reward_function.path={work / 'reward.py'}",
            *overrides,
        ]
        return arguments, {}

    return command


TRAINER_ROLES = {
    "trainer": r"verl\.trainer\.main_ppo",
    "task-runner": r"^ray::TaskRunner",
    "actor": r"^ray::WorkerDict",
    "rollout": r"^ray::HFServer",
    "agent-loop": r"^ray::AgentLoopWorker",
    "reward": r"^ray::RewardLoopWorker",
    "raylet": r"/raylet/raylet ",
    "gcs": r"/gcs_server ",
    "launcher": r"",
}
COUNTDOWN = Subject(
    name="countdown",
    steps=range(STEPS + 1),
    command=quickstart("countdown"),
    marks=("runs/*-001/attempt-*/attempt.json", "runs/*-001/attempt-*/metrics.jsonl"),
    roles=TRAINER_ROLES,
    inputs=("runs/data", "runs/models"),
    rows=rows_of_verl,
    compared=COMPARED,
    alpha=("actor/hpo/alpha", "actor/hpo/share_positive", "actor/hpo/share_negative"),
    last_whole=last_whole_of_verl,
    resumes=resumes_of_verl,
    incomplete=incomplete_run_of_verl,
)


# The same data from another file, which a fault can change.
OTHER_FILE = dataclasses.replace(
    COUNTDOWN, command=lambda work: quickstart("countdown", f"data.train_files={work / 'data.parquet'}")(work)
)
# verl's SFT trainer, and then RL: the quickstart of TeleLogs.
TELELOGS = dataclasses.replace(
    COUNTDOWN,
    name="telelogs",
    command=quickstart("telelogs"),
    marks=("runs/*-001/sft_metrics.jsonl",),
    roles={"sft": r"verl\.trainer\.sft_trainer", "launcher": ""},
    # Each case trains the start model itself.
    inputs=("runs/data",),
)


# --- verl's SFT trainer, with resumption ---------------------------------------------------------------------------

SFT_EPOCHS = 3
#: Steps of an epoch: 32 rows in batches of 8.
SFT_EPOCH = 4


def sft_logs(work: Path) -> list[Path]:
    """The metrics of each process, in order."""
    return sorted(work.glob("sft/metrics-*.jsonl"))


def sft_command(work: Path) -> tuple[list[str], dict[str, str]]:
    """The SFT trainer of verl with the config of TeleLogs, which saves and evaluates after each epoch."""
    number = len(sft_logs(work)) + 1
    arguments = [
        *[sys.executable, "-m", "verl.trainer.sft_trainer", "--config-name=telelogs_sft_cpu"],
        *[f"model.path={work / 'sft' / 'model'}", f"trainer.total_epochs={SFT_EPOCHS}", "trainer.logger=[file]"],
        *[f"data.train_files={work / 'sft' / 'train.parquet'}", f"data.val_files={work / 'sft' / 'test.parquet'}"],
        *[f"trainer.default_local_dir={work / 'sft' / 'checkpoints'}", f"hydra.run.dir={work / 'sft' / 'hydra'}"],
    ]
    metrics = work / "sft" / f"metrics-{number}.jsonl"
    return arguments, {**ENVIRONMENT, **ONE_RANK, **LOG_ENVIRONMENT, "VERL_FILE_LOGGER_PATH": str(metrics)}


def prepare_sft(folder: Path) -> None:
    """Write 32 training rows, 8 validation rows and a model of random weights."""
    import pyarrow.parquet as pq

    from hpo_plugin.quickstart.start_model import StartModelConfig, save_untrained_model
    from hpo_plugin.tasks.telelogs import prepare_telelogs

    made = prepare_telelogs(folder / "data", reduction="laptop", train_size=32, test_size=16, seed=SEED, sft=True)
    (folder / "sft").mkdir()
    for name, rows in (("train", SFT_EPOCH * 8), ("test", 8)):
        table = pq.read_table(made.files[f"sft_{name}"])
        pq.write_table(table.slice(0, rows), folder / "sft" / f"{name}.parquet")
    save_untrained_model(folder / "sft" / "model", seed=SEED, config=StartModelConfig(max_positions=512))


def rows_of_sft(work: Path) -> list[tuple[int, dict[str, Any]]]:
    """The metrics of a run: of each step, those of the last process that trained it."""
    merged: Rows = {}
    for path in sft_logs(work):
        rows = read_rows(path)
        merged = {step: row for step, row in merged.items() if not rows or step < rows[0][0]}
        for step, row in rows:
            merged[step] = merged.get(step, {}) | row
    return sorted(merged.items())


def sft_checkpoints(work: Path) -> list[int]:
    """The steps of the whole checkpoints that verl has recorded."""
    tracker = work / "sft" / "checkpoints" / "latest_checkpointed_iteration.txt"
    latest = int(tracker.read_text()) if tracker.exists() else 0
    found = []
    for path in (work / "sft" / "checkpoints").glob("global_step_*"):
        step, files = int(path.name.rpartition("_")[2]), list(path.glob("*.pt"))
        if step <= latest and len(files) == 4 and can_load(files) and (path / "huggingface").exists():
            found.append(step)
    return sorted(found)


def resumes_of_sft(work: Path) -> list[int | None]:
    """The step before the first one that each process has trained."""
    firsts = [rows[0][0] for rows in map(read_rows, sft_logs(work)) if rows]
    return [first - 1 if first > 1 else None for first in firsts]


SFT = Subject(
    name="sft",
    steps=range(1, SFT_EPOCHS * SFT_EPOCH + 1),
    command=sft_command,
    marks=("sft/metrics-*.jsonl", "sft/checkpoints/latest_checkpointed_iteration.txt"),
    roles={"launcher": ""},
    inputs=("sft/model", "sft/train.parquet", "sft/test.parquet"),
    rows=rows_of_sft,
    compared=("train/loss", "train/lr", "val/loss"),
    alpha=(),
    last_whole=lambda work: max(sft_checkpoints(work), default=None),
    resumes=resumes_of_sft,
    incomplete=lambda work: (
        [] if SFT_EPOCHS * SFT_EPOCH in sft_checkpoints(work) else ["no checkpoint of the last step"]
    ),
    prepare=prepare_sft,
)


def sft_boundary(step: int, work: Path) -> Result:
    """Kill verl's SFT trainer before the first step after a checkpoint, and at other steps."""
    result = Result(inputs=1)
    made = copy_inputs(SFT, work)

    def say(text: str) -> None:
        result.failures.append(f"SFT, killed after step {step}: {text}")

    with started(SFT, work) as command:
        deadline = time.monotonic() + LIMIT
        tracker = work / "sft" / "checkpoints" / "latest_checkpointed_iteration.txt"

        def reached() -> bool:
            if step % SFT_EPOCH == 0:
                return tracker.exists() and int(tracker.read_text() or 0) >= step
            return any(row >= step for path in sft_logs(work) for row, _ in read_rows(path))

        while not reached():
            if not command.running() or time.monotonic() > deadline:
                say(f"the command did not reach step {step}\n{command.output()[-2000:]}")
                return result
            time.sleep(0.005)
        kill_one(command, None, random.Random(0))
        command.wait()
    result.count("SIGKILLs")
    finish(SFT, work, made, result, say)
    return result


# --- two nodes -----------------------------------------------------------------------------------------------------


def node_lost_twice(work: Path) -> Result:
    """Kill all processes of a worker node, start it again, and do so once more in the resumed run.

    Two rollout servers answer the requests, and timing determines which: the samples of a repeated step can differ, so
    only the prompts are compared with the reference.
    """
    sys.path.insert(0, str(ROOT / "tests" / "cluster"))
    hosts = importlib.import_module("hosts")
    result = Result(inputs=2)
    made, say = copy_inputs(COUNTDOWN, work), result.failures.append
    (work / "reward.py").write_text(REWARD)
    (data,), (model,) = (work / "runs" / "data").glob("*"), (work / "runs" / "models").glob("*")
    run, log = work / "runs" / "launch-001", work / "output.log"
    arguments = [
        *[sys.executable, "-m", "hpo_plugin.cli", "launch", "--config-name=countdown_cpu", f"--run-dir={run}"],
        *["--wait-for-nodes=300", f"actor_rollout_ref.model.path={model}", f"data.seed={SEED}"],
        *[f"data.train_files={data / 'train.parquet'}", f"data.val_files={data / 'test.parquet'}"],
        *[f"reward.custom_reward_function.path={work / 'reward.py'}", "data.train_batch_size=8"],
        *["actor_rollout_ref.actor.ppo_mini_batch_size=4", "data.train_max_samples=32"],
        *[f"trainer.total_training_steps={STEPS}", f"trainer.save_freq={SAVE_EVERY}", "trainer.test_freq=-1"],
        *["trainer.nnodes=2", "trainer.n_gpus_per_node=1"],
    ]
    with hosts.two_hosts() as (head, worker):
        head.start_ray()
        worker.start_ray(head)
        launcher = head.start(*arguments, log=log, RAY_ADDRESS=f"{head.address}:6379", PYTHONPATH=str(ROOT))
        for attempt, step in ((1, 3), (2, 5)):
            metrics = run / f"attempt-{attempt}" / "metrics.jsonl"

            def reached(metrics: Path = metrics, step: int = step) -> bool:
                assert launcher.poll() is None, log.read_text()[-3000:]
                return step in dict(read_rows(metrics))

            hosts.wait_for(reached, f"step {step} of attempt {attempt}", LIMIT)
            worker.kill()
            result.count("nodes lost")
            worker.boot()
            worker.start_ray(head)
        if launcher.wait(timeout=LIMIT) != 0:
            say(f"the launcher stopped\n{log.read_text()[-3000:]}")
            return result
    print(log.read_text(), flush=True)
    if resumes_of_verl(work) != [None, 2, 4]:
        say(f"the attempts resumed from {resumes_of_verl(work)}, and not from [None, 2, 4]")
    same_prompts = dataclasses.replace(COUNTDOWN, compared=("prompt_length/mean",))
    # The reference has evaluated before training, in step 0.
    result.failures += check_rows(same_prompts, rows_of_verl(work), made.rows)
    result.failures += incomplete_run_of_verl(work)
    return result


# --- the probes ----------------------------------------------------------------------------------------------------


def kill_probe(subject: Subject, role: str, seeds: int, title: str) -> Probe:
    """The probe that kills processes of one role."""
    return Probe(
        f"{subject.name}-{role}",
        "faults",
        title,
        "the run continues, or stops with the cause and is resumed",
        seeded(seeds, lambda work, seed: kill_case(subject, role, seed, work)),
        limit=3 * LIMIT,
    )


STOPS = "the run stops with the cause, and is resumed from the last whole checkpoint"
RESUMES = (
    "the run is resumed from the last whole checkpoint, and the command names a damaged or missing file of a later "
    "one, but for the tracker file"
)
MODEL = "actor/model_world_size_1_rank_0.pt"


def probe(name: str, title: str, expected: str, cases: Mapping[str, Callable[[Path], Result]]) -> Probe:
    """A probe of this module."""
    return Probe(name, "faults", title, expected, cases, limit=4 * LIMIT)


def damaged(change: Callable[[Path], None], said: str | None, expected: int | None) -> Callable[[Path], Result]:
    """A case of :func:`after_kill` for Countdown."""
    return functools.partial(after_kill, COUNTDOWN, change, said, expected)


PROBES: tuple[Probe, ...] = (
    *(
        kill_probe(COUNTDOWN, role, seeds, f"SIGKILL of {title}, quickstart")
        for role, seeds, title in (
            ("launcher", 4, "`hpo-plugin`"),
            ("trainer", 4, "verl's trainer"),
            ("task-runner", 2, "verl's `TaskRunner`"),
            ("actor", 4, "the actor worker"),
            ("rollout", 4, "the rollout server"),
            ("agent-loop", 3, "the agent loop worker"),
            ("reward", 3, "the reward worker"),
            ("raylet", 3, "Ray's raylet"),
            ("gcs", 2, "Ray's GCS server"),
        )
    ),
    kill_probe(TELELOGS, "sft", 2, "SIGKILL of verl's SFT trainer, quickstart of TeleLogs"),
    kill_probe(TELELOGS, "launcher", 2, "SIGKILL of `hpo-plugin`, quickstart of TeleLogs"),
    kill_probe(SFT, "launcher", 3, "SIGKILL of verl's SFT trainer, `telelogs_sft_cpu`"),
    probe(
        "sft-boundary",
        f"SIGKILL of verl's SFT trainer after a checkpoint at the end of an epoch ({SFT_EPOCH} steps), and around it",
        "the resumed run trains all steps",
        {f"step-{step}": functools.partial(sft_boundary, step) for step in (3, 4, 5, 8)},
    ),
    probe(
        "reward-fault",
        "a reward that raises, hangs or returns NaN",
        STOPS,
        {
            "raise": functools.partial(
                during, COUNTDOWN, functools.partial(bad_reward, "raise"), "Cause: .*this reward fails on purpose"
            ),
            "hang": functools.partial(
                during, COUNTDOWN, functools.partial(bad_reward, "hang"), f"no progress for {STALL:g} seconds"
            ),
            "nan": functools.partial(during, COUNTDOWN, functools.partial(bad_reward, "nan"), "Cause: .*NaN"),
        },
    ),
    probe("disk-full", "a full disk while a checkpoint is written", STOPS, {"checkpoint": disk_full}),
    probe(
        "checkpoint-directory",
        "a read-only directory of checkpoints",
        STOPS,
        {"read-only": functools.partial(during, COUNTDOWN, read_only, "Cause: .*Read-only file system")},
    ),
    probe(
        "checkpoint-directory-vanished",
        "the directory of checkpoints is removed during a run",
        "the run continues, and writes later checkpoints",
        {"vanished": functools.partial(during, COUNTDOWN, vanished, None)},
    ),
    probe(
        "checkpoint-damaged",
        "SIGKILL, and a damaged newest checkpoint: files truncated or missing, verl's tracker file empty or missing",
        RESUMES,
        {
            "model-half": damaged(functools.partial(truncate, MODEL, 0.5), f"{MODEL} is truncated", 2),
            "model-empty": damaged(functools.partial(truncate, MODEL, 0.0), f"{MODEL} is truncated", 2),
            "model-missing": damaged(functools.partial(remove, MODEL), "is missing", 2),
            "data-half": damaged(functools.partial(truncate, "data.pt", 0.5), "data.pt is truncated", 2),
            "tracker-empty": damaged(functools.partial(tracker, ""), None, 2),
            "tracker-missing": damaged(functools.partial(tracker, None), None, 2),
            "all-missing": damaged(remove_all, "there is no whole checkpoint, so steps 1 to", None),
        },
    ),
    probe(
        "corrupt-data",
        "a training file with a corrupt row group",
        "the run stops with the cause, and the next command with the whole file trains all steps",
        {
            "row-group": functools.partial(
                during, OTHER_FILE, corrupt_row_group, r"Cause: .*(?:data\.parquet|[Pp]arquet|generating)", step=0
            )
        },
    ),
    probe(
        "node-lost-twice",
        "all processes of a worker node killed, twice in one run of `hpo-plugin launch`",
        "the launcher resumes the run from the last whole checkpoint",
        {"twice": node_lost_twice},
    ),
)
