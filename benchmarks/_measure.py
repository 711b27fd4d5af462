"""Time side by side, and memory, of functions on tensors."""

from __future__ import annotations

import os
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def medians(functions: dict[str, Callable[[], Any]], *, seconds: float, at_least: int = 7) -> dict[str, float]:
    """Seconds of each function: medians of repeats that take turns, so that all of them meet the same machine.

    Args:
        functions: by name.
        seconds: no round is started later than this.
        at_least: rounds, however long they take.
    """
    names = list(functions)
    times: dict[str, list[float]] = {name: [] for name in names}
    for function in functions.values():
        function()
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < at_least or time.perf_counter() < end:
        for name in names[rounds % len(names) :] + names[: rounds % len(names)]:
            start = time.perf_counter()
            result = functions[name]()
            times[name].append(time.perf_counter() - start)
            del result
        rounds += 1
    return {name: statistics.median(values) for name, values in times.items()}


def peak_bytes(function: Callable[[], Any]) -> int:
    """The most that torch's CPU allocator holds at a time for a call, and Python and numpy, its result included.

    From the allocation events of torch's profiler, so that every temporary within an operator counts, and from
    tracemalloc. The two maxima need not be at the same time: their sum is an upper bound.
    """
    tracemalloc.start()
    result = function()
    python = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    with _quiet(), torch.autograd.profiler.profile(profile_memory=True) as profile:
        result = function()
    del result
    now = peak = 0
    for event in profile.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak + python


@contextmanager
def _quiet() -> Iterator[None]:
    """The profiler's own lines, which it writes past Python."""
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)
