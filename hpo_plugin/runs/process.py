"""verl's trainer as a process of its own, with everything it starts: followed, and ended without a trace.

verl starts Ray, Ray starts a dozen processes, and some of them start more. All of them stay in the session of the
trainer (setsid), which is how they are told from every other Ray cluster on the machine.
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

#: Seconds that processes have to end by themselves.
GRACE = 10.0
_PR_SET_PDEATHSIG = 1


class StalledError(RuntimeError):
    """The trainer made no progress for too long."""


T = TypeVar("T")


def drive(turns: Generator[None, None, T], interval: float = 0.2) -> T:
    """Run a generator of turns to its end.

    Args:
        turns: Closed in any case.
        interval: Seconds between two turns.

    Returns:
        What it returns.
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
    """A running trainer. Use as a context manager: on the way out, none of its processes is left."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path, record: Path) -> None:
        """Start it.

        Args:
            command: Program and arguments.
            environment: Added to this process's own.
            log: Takes all output.
            record: Takes what :func:`end_leftovers` needs if this process is killed.
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
        """As ``subprocess`` gives it; None while it runs."""
        return self._process.poll()

    def follow(self, look: Callable[[], bool], *, stall: float, interval: float = 0.2) -> int:
        """Wait for the end.

        Args:
            look: Called every ``interval`` seconds and once after the end; says whether there was progress.
            stall: Seconds without progress after which it is given up.
            interval: Seconds between looks.

        Returns:
            The exit status.

        Raises:
            StalledError: Nothing happened for ``stall`` seconds.
        """
        return drive(self.turns(look, stall=stall), interval)

    def turns(self, look: Callable[[], bool], *, stall: float) -> Generator[None, None, int]:
        """Do what :meth:`follow` does, a look at a time: the caller waits as long as it likes in between."""
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
        """End every process of the session: asked first, then killed."""
        if self._process.poll() is None:
            self._process.terminate()
        _end_session(self._process.pid, self._process)
        with contextlib.suppress(FileNotFoundError):
            self._record.unlink()


def end_leftovers(record: Path) -> int:
    """End what a killed call has left running.

    Args:
        record: Written by :class:`Trainer`.

    Returns:
        How many processes there were.
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
    # A leader that began at another time is a stranger who was given the same number after a restart, say.
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
                # A dead child counts until it is waited for.
                leader.poll()
            if not _session(session):
                return
            time.sleep(0.1)
    left = ", ".join(str(process.pid) for process in _session(session))
    if left:
        raise RuntimeError(f"these processes of the run do not end: {left}")


def _die_with_parent() -> Callable[[], None] | None:
    """What makes the kernel kill the trainer if this process is killed (Linux); Ray's processes then follow it."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    parent = os.getpid()

    def set_signal() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            # It died before the call above.
            os._exit(1)

    return set_signal
