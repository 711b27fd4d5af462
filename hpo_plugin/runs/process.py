"""Runs verl's trainer as a child process, follows it, and ends it with all processes that it started.

verl starts Ray, Ray starts a dozen processes, and some of them start more. All of them stay in the session of the
trainer (setsid). The session distinguishes them from other Ray clusters on the machine.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import psutil

from hpo_plugin.files import atomic_write

#: Seconds to wait for the end of the processes after each signal.
GRACE = 10.0
_PR_SET_PDEATHSIG = 1


class StalledError(RuntimeError):
    """The trainer made no progress within the time limit."""


T = TypeVar("T")


def drive(turns: Generator[None, None, T], interval: float = 0.2) -> T:
    """Run a generator of turns to its end.

    Args:
        turns: The generator. The function always closes it.
        interval: Seconds between two turns.

    Returns:
        The return value of the generator.
    """
    with contextlib.closing(turns):
        while True:
            try:
                next(turns)
            except StopIteration as end:
                value: T = end.value
                return value
            time.sleep(interval)


class Trainer:
    """A running trainer, used as a context manager. On exit, it ends all processes of the trainer."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path, record: Path) -> None:
        """Start the trainer.

        Args:
            command: Program and arguments.
            environment: Variables that are added to the environment of this process.
            log: File for all output.
            record: File for the data that :func:`end_leftovers` needs if this process is killed.
        """
        self._record = record
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent(),
            )
        try:
            started = psutil.Process(self._process.pid).create_time()
            atomic_write(record, json.dumps({"session": self._process.pid, "started": started}).encode())
        except BaseException:
            # An interrupt before __enter__ would leave the trainer running.
            self.stop()
            raise

    def __enter__(self) -> Trainer:
        """Return itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """End every process of the trainer's session."""
        self.stop()

    @property
    def exit_status(self) -> int | None:
        """The exit status, as in ``subprocess``; None while the trainer runs."""
        return self._process.poll()

    def follow(self, look: Callable[[], bool], *, stall: float, interval: float = 0.2) -> int:
        """Wait for the end of the trainer.

        Args:
            look: Called every ``interval`` seconds and once after the end. Returns whether there was progress.
            stall: Maximum time without progress, in seconds.
            interval: Seconds between two calls of ``look``.

        Returns:
            The exit status.

        Raises:
            StalledError: There was no progress for ``stall`` seconds.
        """
        return drive(self.turns(look, stall=stall), interval)

    def turns(self, look: Callable[[], bool], *, stall: float) -> Generator[None, None, int]:
        """The same as :meth:`follow`, as a generator: it calls ``look`` once per turn, at the caller's interval."""
        last = time.monotonic()
        while True:
            status = self.exit_status
            if look():
                last = time.monotonic()
            if status is not None:
                return status
            if time.monotonic() - last > stall:
                raise StalledError(f"no progress for {stall:g} seconds")
            yield

    def stop(self) -> None:
        """End every process of the session, with SIGTERM first and then with SIGKILL."""
        if self._process.poll() is None:
            self._process.terminate()
        _end_session(self._process.pid, self._process)
        with contextlib.suppress(FileNotFoundError):
            self._record.unlink()


def end_leftovers(record: Path) -> int:
    """End the processes that a killed call has left running.

    Args:
        record: The file that :class:`Trainer` wrote.

    Returns:
        The number of these processes.
    """
    try:
        noted = json.loads(record.read_bytes())
        session, started = int(noted["session"]), float(noted["started"])
    except FileNotFoundError:
        return 0
    except (ValueError, KeyError, TypeError):
        record.unlink()
        return 0
    leader = _create_time(session)
    # A leader with another start time is a different process that got the same id, for example after a reboot.
    left = 0
    if leader is None or abs(leader - started) < 1:
        members = [process for process in _session(session) if (_create_time(process.pid) or 0) >= started - 1]
        left = len(members)
        if members:
            _end_session(session, None)
    record.unlink()
    return left


def _create_time(pid: int) -> float | None:
    try:
        return float(psutil.Process(pid).create_time())
    except psutil.NoSuchProcess:
        return None


def _session(session: int) -> list[psutil.Process]:
    return [process for process in psutil.process_iter() if _is_member(process.pid, session)]


def _is_member(pid: int, session: int) -> bool:
    try:
        return os.getsid(pid) == session and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, PermissionError, psutil.NoSuchProcess):
        return False


def _end_session(session: int, leader: subprocess.Popen[bytes] | None) -> None:
    for sent in (signal.SIGTERM, signal.SIGKILL):
        for process in _session(session):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(sent)
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline:
            if leader is not None:
                # A dead child is in the session until it is waited for.
                leader.poll()
            if not _session(session):
                return
            time.sleep(0.1)
    left = ", ".join(str(process.pid) for process in _session(session))
    if left:
        raise RuntimeError(f"these processes of the run did not end after SIGKILL: {left}")


def _die_with_parent() -> Callable[[], None] | None:
    """A function that makes the kernel kill the trainer if this process is killed (Linux). Ray's processes then end."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    parent = os.getpid()

    def set_signal() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            # The parent died before the call above.
            os._exit(1)

    return set_signal
