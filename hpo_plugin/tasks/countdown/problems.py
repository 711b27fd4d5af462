"""Countdown problems: a seeded generator, a solver, and the identity that keeps splits disjoint.

A problem is a list of numbers and a target. Every number is to be used exactly once, with + - * / and parentheses;
intermediate values may be negative or fractional. A generated problem is solvable because it is *built*: numbers are
drawn, combined by random operations in random order, and the value is the target if it is an integer in range. (Drawing
the target independently of the numbers would be solvable only ~2 % of the time for three numbers, ~15 % for four.)
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

import numpy as np
import numpy.typing as npt

#: Constructions evaluated at once. Part of what a seed means: changing it changes the problems of a seed.
_BLOCK = 16_384
#: The ranges count as exhausted when nothing new has come for so many blocks, or among so many problems.
_BARREN_BLOCKS, _BARREN_PROBLEMS = 32, 50_000

_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class CountdownProblem:
    """One problem.

    Attributes:
        numbers: The given numbers, in the order in which they are shown.
        target: The value to reach.
    """

    numbers: tuple[int, ...]
    target: int

    @property
    def identity(self) -> tuple[tuple[int, ...], int]:
        """What makes two problems the same problem: the sorted numbers and the target."""
        return tuple(sorted(self.numbers)), self.target


@dataclass(frozen=True)
class CountdownConfig:
    """What to generate. The defaults are the ranges of the public data.

    Attributes:
        counts: How many numbers a problem has. Several values alternate, so each gets an equal share.
        min_number: Smallest given number.
        max_number: Largest given number.
        min_target: Smallest target.
        max_target: Largest target.
        seed: A non-negative integer; the same config gives the same problems.
    """

    counts: tuple[int, ...] = (3, 4)
    min_number: int = 1
    max_number: int = 99
    min_target: int = 10
    max_target: int = 100
    seed: int = 0

    def validate(self) -> None:
        """Check the config.

        Raises:
            ValueError: Naming the field, its value and what to do.
        """
        if not self.counts:
            raise ValueError("counts is empty; set the count of numbers in a problem, for example (3, 4)")
        for count in self.counts:
            if count < 2:
                raise ValueError(f"counts={self.counts}: a problem needs at least 2 numbers, got {count}")
        if len(set(self.counts)) != len(self.counts):
            raise ValueError(f"counts={self.counts} contains a count twice; list each count once")
        if self.min_number < 1:
            raise ValueError(f"min_number={self.min_number} must be at least 1")
        if self.max_number < self.min_number:
            raise ValueError(f"max_number={self.max_number} is below min_number={self.min_number}")
        if self.min_target < 1:
            raise ValueError(f"min_target={self.min_target} must be at least 1")
        if self.max_target < self.min_target:
            raise ValueError(f"max_target={self.max_target} is below min_target={self.min_target}")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must not be negative")
        most = max(self.counts)
        if not _fits_int64(most, self.max_number):
            raise ValueError(
                f"counts={self.counts} with max_number={self.max_number} exceeds the generator's exact 64-bit "
                "arithmetic; lower one of them"
            )
        if self.min_target > _bound(most, self.max_number):
            raise ValueError(
                f"min_target={self.min_target} is out of reach of {most} numbers up to {self.max_number}; lower it, "
                "or raise max_number"
            )


def problem_stream(config: CountdownConfig) -> Iterator[CountdownProblem]:
    """Yield distinct solvable problems, without end until the ranges are exhausted.

    No two have the same :attr:`CountdownProblem.identity`, so any partition of the stream into splits is disjoint.

    Args:
        config: What to generate; the stream is a function of it alone, and of no library's version: random numbers are
            derived from the raw PCG64 stream, which numpy guarantees, rather than from ``Generator`` methods, which it
            does not.

    Raises:
        ValueError: If the config is invalid.
    """
    config.validate()
    streams = [_stream_of_count(config, count) for count in config.counts]
    while streams:
        # A count whose problems are used up leaves the rotation; the others stay.
        for stream in list(streams):
            problem = next(stream, None)
            if problem is None:
                streams.remove(stream)
            else:
                yield problem


def generate_problems(
    config: CountdownConfig, size: int, progress: Callable[[int, int], None] | None = None
) -> list[CountdownProblem]:
    """Return the first ``size`` problems of :func:`problem_stream`.

    Args:
        config: What to generate.
        size: How many problems.
        progress: Called with (problems so far, ``size``) now and then.

    Raises:
        ValueError: If the config is invalid, ``size`` is negative, or the ranges hold too few distinct problems.
    """
    if size < 0:
        raise ValueError(f"size={size} must not be negative")
    problems: list[CountdownProblem] = []
    stream = problem_stream(config)
    while len(problems) < size:
        problem = next(stream, None)
        if problem is None:
            raise ValueError(
                f"found only {len(problems)} of the {size} distinct problems requested with counts={config.counts}, "
                f"numbers {config.min_number}-{config.max_number}, targets {config.min_target}-{config.max_target}; "
                "request fewer, or widen the ranges"
            )
        problems.append(problem)
        if progress is not None and len(problems) % 1024 == 0:
            progress(len(problems), size)
    if progress is not None:
        progress(size, size)
    return problems


def _stream_of_count(config: CountdownConfig, count: int) -> Iterator[CountdownProblem]:
    bits = np.random.PCG64(np.random.SeedSequence([config.seed, count]))
    seen: set[tuple[int, ...]] = set()
    barren_blocks = barren_problems = 0
    while barren_blocks < _BARREN_BLOCKS and barren_problems < _BARREN_PROBLEMS:
        numbers, targets = _build_block(bits, config, count)
        keys = np.concatenate([np.sort(numbers, axis=1), targets[:, None]], axis=1).tolist()
        found = len(seen)
        for shown, key in zip(numbers.tolist(), keys, strict=True):
            identity = tuple(key)
            if identity not in seen:
                seen.add(identity)
                yield CountdownProblem(tuple(shown), key[-1])
        if len(seen) > found:
            barren_blocks = barren_problems = 0
        else:
            barren_blocks += 1
            barren_problems += len(keys)


def _uniform(bits: np.random.PCG64, low: int, high: int, shape: int | tuple[int, int]) -> _Ints:
    """Integers in [low, high] from the upper 32 bits of the raw stream; the bias is below (high - low) / 2**32."""
    raw = bits.random_raw(shape) >> np.uint64(32)
    drawn: _Ints = ((raw * np.uint64(high - low + 1)) >> np.uint64(32)).astype(np.int64)
    return drawn + low


def _build_block(bits: np.random.PCG64, config: CountdownConfig, count: int) -> tuple[_Ints, _Ints]:
    """Build one block of random expressions; return numbers [k, count] and targets [k] of those that are problems.

    Each row starts as its numbers; a step replaces two of its values, chosen at random and in random order, by the
    result of a random operation, until one value is left.
    """
    rows = np.arange(_BLOCK)
    numbers = _uniform(bits, config.min_number, config.max_number, (count, _BLOCK))
    numerators, denominators = numbers.copy(), np.ones_like(numbers)
    valid = np.ones(_BLOCK, dtype=bool)
    for remaining in range(count, 1, -1):
        # One draw decides the operation, the left operand and the right operand, which is another value than the left.
        draw = _uniform(bits, 0, 4 * remaining * (remaining - 1) - 1, _BLOCK)
        operation, draw = draw & 3, draw >> 2
        first, second = draw % remaining, draw // remaining
        second += second >= first
        numerator, denominator = _combine(
            operation,
            numerators[first, rows],
            denominators[first, rows],
            numerators[second, rows],
            denominators[second, rows],
        )
        divides_by_zero = denominator == 0
        valid &= ~divides_by_zero
        # A row that divides by zero is out; 1 keeps its arithmetic defined.
        denominator[divides_by_zero] = 1
        # The result takes the place of the left operand, and the last value that of the right one. (If the last value
        # was the left operand, that is the result.)
        numerators[first, rows], denominators[first, rows] = numerator, denominator
        numerators[second, rows], denominators[second, rows] = numerators[remaining - 1], denominators[remaining - 1]
    targets = numerators[0] // denominators[0]
    valid &= targets * denominators[0] == numerators[0]
    valid &= (targets >= config.min_target) & (targets <= config.max_target)
    return numbers[:, valid].T, targets[valid]


def _combine(operation: _Ints, a: _Ints, a_below: _Ints, b: _Ints, b_below: _Ints) -> tuple[_Ints, _Ints]:
    """Exact a (operation) b on unreduced fractions; operations 0 to 3 are + - * /. Denominator 0: it divides by 0."""
    left, right = a * b_below, b * a_below
    numerator = left + np.where(operation == 1, -right, right)
    np.copyto(numerator, a * b, where=operation == 2)
    np.copyto(numerator, left, where=operation == 3)
    denominator = a_below * b_below
    np.copyto(denominator, right, where=operation == 3)
    return numerator, denominator


def _bound(count: int, largest: int) -> int:
    """What numerators and denominators of unreduced fractions of ``count`` numbers cannot exceed.

    Those of a combination of i and j numbers are at most 2 * B(i) * B(j), with B(1) = ``largest``.
    """
    return int(2 ** (count - 1) * largest**count)


def _fits_int64(count: int, largest: int) -> bool:
    return _bound(count, largest) < 2**63


# --- solving -------------------------------------------------------------------------------------------------------


def fits_exactly(numbers: Sequence[int], target: int) -> bool:
    """Return whether the 64-bit arithmetic of :func:`solvable` is exact for a problem of this size and count."""
    # One more factor than the numbers: the comparison multiplies a denominator by the target.
    return _fits_int64(len(numbers) + 1, max(*numbers, abs(target), 1))


def solvable(numbers: npt.ArrayLike, targets: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Return for each of many problems whether it has a solution.

    Args:
        numbers: Integers of shape [problems, count], each at least 0.
        targets: Integers of shape [problems].

    Returns:
        Booleans of shape [problems].

    Raises:
        ValueError: If shapes disagree, or the numbers are too many or too large for exact 64-bit arithmetic.
    """
    given = np.asarray(numbers, dtype=np.int64)
    wanted = np.asarray(targets, dtype=np.int64)
    if given.ndim != 2 or wanted.shape != given.shape[:1]:
        raise ValueError(f"numbers must be [problems, count] and targets [problems], got {given.shape}, {wanted.shape}")
    if given.size == 0:
        return np.zeros(len(given), dtype=bool)
    largest_number, largest_target = int(np.abs(given).max()), int(np.abs(wanted).max())
    if not fits_exactly((largest_number,) * given.shape[1], largest_target):
        raise ValueError(
            f"{given.shape[1]} numbers up to {largest_number} with targets up to {largest_target} exceed exact "
            "64-bit arithmetic; use solve()"
        )
    found = np.zeros(len(given), dtype=bool)
    # Small blocks keep the intermediate columns in the cache.
    for begin in range(0, len(given), 4096):
        block = slice(begin, begin + 4096)
        columns = [(column, np.ones_like(column)) for column in np.ascontiguousarray(given[block].T)]
        _mark_reached(columns, wanted[block], found[block])
    return found


def _mark_reached(columns: list[tuple[_Ints, _Ints]], targets: _Ints, found: npt.NDArray[np.bool_]) -> None:
    if len(columns) == 1:
        numerator, denominator = columns[0]
        found |= (denominator != 0) & (numerator == targets * denominator)
        return
    for i, (a, a_below) in enumerate(columns):
        for j in range(i + 1, len(columns)):
            b, b_below = columns[j]
            rest = [column for k, column in enumerate(columns) if k not in (i, j)]
            left, right, below = a * b_below, b * a_below, a_below * b_below
            # A denominator of 0 must stay 0 in whatever is built on it: in `left` and `right` above it makes numerators
            # 0, and in the two quotients the zeros below keep it.
            defined = below != 0
            for value in (
                (left + right, below),
                (left - right, below),
                (right - left, below),
                (a * b, below),
                (left, right * defined),
                (right, left * defined),
            ):
                _mark_reached([value, *rest], targets, found)


def reachable_targets(numbers: Sequence[int], min_target: int, max_target: int) -> list[int]:
    """Return every integer in [min_target, max_target] that the numbers can make, in ascending order.

    Args:
        numbers: The given numbers; time and memory grow steeply beyond five.
        min_target: Smallest target.
        max_target: Largest target.
    """
    values = _Values(tuple(numbers)).of((1 << len(numbers)) - 1) if numbers else {}
    return sorted(int(value) for value in values if value.denominator == 1 and min_target <= value <= max_target)


def solve(numbers: Sequence[int], target: int, rng: random.Random | None = None) -> str | None:
    """Return one expression that uses every number once and equals the target, or None if there is none.

    Args:
        numbers: The given numbers; time and memory grow steeply beyond six.
        target: The value to reach.
        rng: If given, which solution is returned is random; else it is a function of the arguments.

    Returns:
        An expression without spaces and without needless parentheses, such as ``3*5+7``.
    """
    shown = list(numbers)
    if not shown:
        return None
    if len(shown) == 1:
        return str(target) if shown[0] == target else None
    if rng is not None:
        rng.shuffle(shown)
    values = _Values(tuple(shown))
    wanted = Fraction(target)
    splits = list(_splits((1 << len(shown)) - 1))
    if rng is not None:
        rng.shuffle(splits)
    for left, right in splits:
        others = values.of(right)
        candidates = list(values.of(left))
        if rng is not None:
            rng.shuffle(candidates)
        for a in candidates:
            endings = [ending for ending in _last_operations(a, wanted, others) if ending[2] in others]
            if endings:
                operation, swapped, b = endings[0] if rng is None else rng.choice(endings)
                first, second = values.text(left, a), values.text(right, b)
                return join(operation, second, first)[0] if swapped else join(operation, first, second)[0]
    return None


def _last_operations(
    a: Fraction, wanted: Fraction, others: Mapping[Fraction, object]
) -> Iterator[tuple[str, bool, Fraction]]:
    """Yield (operation, whether b stands left, b) such that a and b make ``wanted``; b need not be at hand."""
    yield "+", False, wanted - a
    yield "-", False, a - wanted
    yield "-", True, wanted + a
    if a:
        yield "*", False, wanted / a
        yield "/", True, wanted * a
        if wanted:
            yield "/", False, a / wanted
    elif not wanted:
        # 0 times anything is 0.
        yield "*", False, next(iter(others))


def random_expression(numbers: Sequence[int], rng: random.Random) -> str:
    """Return a random well-formed expression that uses every number once, whatever its value.

    Args:
        numbers: At least one number.
        rng: Source of randomness.

    Raises:
        ValueError: If there are no numbers.
    """
    if not numbers:
        raise ValueError("random_expression needs at least one number")
    parts = [(str(number), 3) for number in numbers]
    while len(parts) > 1:
        left = parts.pop(rng.randrange(len(parts)))
        right = parts.pop(rng.randrange(len(parts)))
        parts.append(join(rng.choice("+-*/"), left, right))
    return parts[0][0]


#: An expression and the strength of its outermost operation: 1 for + -, 2 for * /, 3 for a number.
_Text = tuple[str, int]
#: How a value is made: a given number, or (operation, left subset, left value, right subset, right value).
_Made = int | tuple[str, int, Fraction, int, Fraction]


def join(operation: str, left: _Text, right: _Text) -> _Text:
    """Join two expressions, with parentheses only where they are needed."""
    strength = 1 if operation in "+-" else 2
    left_text = left[0] if left[1] >= strength else f"({left[0]})"
    needs = right[1] < strength or (right[1] == strength and operation in "-/")
    right_text = f"({right[0]})" if needs else right[0]
    return f"{left_text}{operation}{right_text}", strength


def _splits(subset: int) -> Iterator[tuple[int, int]]:
    """Every way to split a set of positions (a bit mask) in two, each once."""
    lowest = subset & -subset
    part = (subset - 1) & subset
    while part:
        if part & lowest:
            yield part, subset ^ part
        part = (part - 1) & subset


class _Values:
    """The values that subsets of some numbers can take, each with one expression."""

    def __init__(self, numbers: tuple[int, ...]):
        self.numbers = numbers
        self.of = cache(self._of)

    def _of(self, subset: int) -> dict[Fraction, _Made]:
        if subset & (subset - 1) == 0:
            number = self.numbers[subset.bit_length() - 1]
            return {Fraction(number): number}
        values: dict[Fraction, _Made] = {}
        for left, right in _splits(subset):
            for a in self.of(left):
                for b in self.of(right):
                    values.setdefault(a + b, ("+", left, a, right, b))
                    values.setdefault(a - b, ("-", left, a, right, b))
                    values.setdefault(b - a, ("-", right, b, left, a))
                    values.setdefault(a * b, ("*", left, a, right, b))
                    if b:
                        values.setdefault(a / b, ("/", left, a, right, b))
                    if a:
                        values.setdefault(b / a, ("/", right, b, left, a))
        return values

    def text(self, subset: int, value: Fraction) -> _Text:
        made = self.of(subset)[value]
        if isinstance(made, int):
            return str(made), 3
        operation, left, a, right, b = made
        return join(operation, self.text(left, a), self.text(right, b))
