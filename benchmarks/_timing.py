"""Clocks: CPU time, because the machine may be busy and every bar is per core."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence


def cpu_seconds(work: Callable[[], object]) -> float:
    """Return the CPU time that one call takes, all threads of this process together."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def rate(work: Callable[[], object], items: int, passes: int = 7) -> tuple[float, str]:
    """Measure a throughput on one core.

    Args:
        work: Treats all items once.
        items: How many.
        passes: How often it is called.

    Returns:
        Items per CPU second, the median over the passes, and their range as text.
    """
    rates = sorted(items / cpu_seconds(work) for _ in range(passes))
    return statistics.median(rates), f"{rates[0]:,.0f} to {rates[-1]:,.0f} in {passes} passes"


def worst(texts: Sequence[str], score: Callable[[str], object], repeats: int = 3) -> tuple[float, str]:
    """Find the text that takes longest.

    Args:
        texts: The candidates; at least one.
        score: Called with each.
        repeats: How often each is tried. Its fastest try counts: what is asked is how much work the text is, not what
            else the machine did meanwhile.

    Returns:
        CPU milliseconds, and the text.
    """

    def took(text: str) -> float:
        return min(cpu_seconds(lambda: score(text)) for _ in range(repeats))

    seconds, text = max((took(text), text) for text in texts)
    return 1000 * seconds, text
