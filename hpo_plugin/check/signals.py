"""Handlers of the signals that end a program: SIGINT, SIGTERM and SIGHUP."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def signal_handlers_kept() -> Iterator[None]:
    """Put back the handlers of the signals that end a program.

    For calls that set their own: Ray replaces that of SIGTERM when a process connects to it, and leaves it so.
    """
    before = {number: signal.getsignal(number) for number in _ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Treat the signals that end a program like Ctrl-C, so that the trainer is ended too.

    The first one counts. Others are ignored: ``timeout``, shells and impatient people send more than one, and the
    second would break off the ending of the trainer, which takes seconds. A signal that was ignored stays so (nohup).
    """
    numbers = [number for number in _ENDING if signal.getsignal(number) is not signal.SIG_IGN]

    def interrupt(number: int, _frame: object) -> None:
        for other in numbers:
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
