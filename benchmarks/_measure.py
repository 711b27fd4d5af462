"""Time side by side, and memory, of functions on tensors."""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


def rounds(
    functions: dict[str, Callable[[], Any]],
    *,
    seconds: float,
    at_least: int = 7,
    synchronize: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each function in each round. In a round all of them take turns, so that all meet the same machine.

    Args:
        functions: by name; each is called once before it is timed.
        seconds: no round is started later than this.
        at_least: rounds, however long they take.
        synchronize: waits for an accelerator; called before each call, and after it within the measured time.

    Returns:
        One value for each name and round.
    """
    names = list(functions)
    times: dict[str, list[float]] = {name: [] for name in names}
    for function in functions.values():
        function()
    end, done = time.perf_counter() + seconds, 0
    while done < at_least or time.perf_counter() < end:
        for name in names[done % len(names) :] + names[: done % len(names)]:
            synchronize()
            start = time.perf_counter()
            result = functions[name]()
            synchronize()
            times[name].append(time.perf_counter() - start)
            del result
        done += 1
    return times


def medians(functions: dict[str, Callable[[], Any]], *, seconds: float, at_least: int = 7) -> dict[str, float]:
    """Seconds of each function: medians over :func:`rounds`."""
    times = rounds(functions, seconds=seconds, at_least=at_least)
    return {name: statistics.median(values) for name, values in times.items()}


def ratio(times: Sequence[float], others: Sequence[float]) -> tuple[float, float, float]:
    """How many times longer one function takes than another, round by round.

    Args:
        times: of the one, at least six values of :func:`rounds`.
        others: of the other, in the same rounds.

    Returns:
        The median of the rounds' ratios, and the ends of its 95 % interval. The ends are order statistics, so the
        interval assumes independent rounds and no distribution.

    Raises:
        ValueError: there are fewer than six rounds.
    """
    ratios = sorted(one / other for one, other in zip(times, others, strict=True))
    n, tail, k = len(ratios), 0.0, 0
    while tail + math.comb(n, k) / 2**n <= 0.025:
        tail += math.comb(n, k) / 2**n
        k += 1
    if not k:
        raise ValueError(f"{n} rounds are too few for a 95 % interval: six are needed")
    return statistics.median(ratios), ratios[k - 1], ratios[n - k]


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
