"""What a probe is, and what it finds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Probe", "Result", "merged", "seeded"]


@dataclass
class Result:
    """What one case of a probe found.

    Attributes:
        inputs: Number of inputs, faults or configs that were tried.
        failures: One line for each input with a wrong outcome; it contains what is needed to repeat it.
        counts: Numbers that are added up over the cases of a probe, for example ``{"accepted": 12}``.
        worst: Numbers of which the largest over the cases is reported. The name contains the unit, for example
            ``{"slowest input (ms)": 1.9}``.
    """

    inputs: int = 0
    failures: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    worst: dict[str, float] = field(default_factory=dict)

    def count(self, name: str, number: int = 1) -> None:
        """Add to a count."""
        self.counts[name] = self.counts.get(name, 0) + number

    def measure(self, name: str, value: float) -> None:
        """Keep the largest value of a measurement."""
        self.worst[name] = max(value, self.worst.get(name, value))


def merged(results: list[Result]) -> Result:
    """The result of several cases: sums of inputs and counts, all failures, the largest of each measurement."""
    total = Result()
    for result in results:
        total.inputs += result.inputs
        total.failures += result.failures
        for name, number in result.counts.items():
            total.count(name, number)
        for name, value in result.worst.items():
            total.measure(name, value)
    return total


@dataclass(frozen=True)
class Probe:
    """One row of the table in ``docs/robustness.md``.

    Attributes:
        name: The name on the command line.
        section: The table that has its row.
        title: What is tried, for example "hostile text, Countdown reward".
        expected: The outcome of each input; every other outcome is a failure.
        cases: The parts of the full run, by a name that is a valid file name. Each runs in a process of its own, which
            has a temporary directory as argument and as working directory. A case that has a result is not run again.
        limit: Time after which a case is stopped and counts as failed, in seconds.
    """

    name: str
    section: str
    title: str
    expected: str
    cases: Mapping[str, Callable[[Path], Result]]
    limit: float = 3600.0


def seeded(number: int, work: Callable[[Path, int], Result]) -> Mapping[str, Callable[[Path], Result]]:
    """The cases of a probe that differ in their seed only.

    Args:
        number: Number of cases. The seeds are 0, 1 and so on.
        work: Runs a case; its arguments are the directory of the case and the seed.
    """

    def case(seed: int) -> Callable[[Path], Result]:
        return lambda folder: work(folder, seed)

    return {f"seed-{seed}": case(seed) for seed in range(number)}
