"""Handlers of the signals that end a program: SIGINT, SIGTERM and SIGHUP."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def signal_handlers_kept() -> Iterator[None]:
    """Restore the handlers of the signals that end a program.

    Use it around calls that set their own handlers: Ray replaces the handler of SIGTERM when a process connects to it,
    and does not restore it.
    """
    before = {number: signal.getsignal(number) for number in _ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt on the signals that end a program, so that the command also ends the trainer.

    Only the first signal has an effect. ``timeout``, shells and users may send more than one, and a second signal would
    interrupt the shutdown of the trainer, which takes seconds. A signal that was ignored before stays ignored (nohup).
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
