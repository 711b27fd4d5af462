"""Countdown problems: solvable, distinct, in range, and a function of the seed."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from hpo_plugin.tasks.countdown import compute_score
from hpo_plugin.tasks.countdown.problems import (
    CountdownConfig,
    generate_problems,
    problem_stream,
    random_expression,
    reachable_targets,
    solvable,
    solve,
)


def brute_force(numbers: tuple[int, ...]) -> set[Fraction]:
    """All values of all expressions, by replacing two values by one in every way; nothing shared, nothing clever."""
    if len(numbers) == 1:
        return {Fraction(numbers[0])}

    def values(left: list[Fraction]) -> set[Fraction]:
        if len(left) == 1:
            return set(left)
        found = set()
        for i, j in itertools.permutations(range(len(left)), 2):
            rest = [value for k, value in enumerate(left) if k not in (i, j)]
            a, b = left[i], left[j]
            for result in (a + b, a - b, a * b, *([a / b] if b else [])):
                found |= values([result, *rest])
        return found

    return values([Fraction(number) for number in numbers])


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8])
def test_generated_problems_are_in_range_and_distinct(count: int) -> None:
    config = CountdownConfig(counts=(count,), min_number=2, max_number=60, min_target=11, max_target=77, seed=3)
    problems = generate_problems(config, 400)
    assert len({problem.identity for problem in problems}) == 400
    for problem in problems:
        assert len(problem.numbers) == count
        assert all(2 <= number <= 60 for number in problem.numbers)
        assert 11 <= problem.target <= 77


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_every_generated_problem_has_a_solution_that_the_reward_accepts(count: int) -> None:
    for problem in generate_problems(CountdownConfig(counts=(count,), seed=1), 60 if count < 5 else 8):
        solution = solve(problem.numbers, problem.target)
        assert solution is not None
        truth = {"target": problem.target, "numbers": list(problem.numbers)}
        assert compute_score("countdown_terse", solution, truth) == 1.0


def test_the_defaults_are_the_ranges_of_the_public_data_half_three_half_four_numbers() -> None:
    problems = generate_problems(CountdownConfig(), 2000)
    assert sum(len(problem.numbers) == 3 for problem in problems) == 1000
    assert sum(len(problem.numbers) == 4 for problem in problems) == 1000
    numbers = [number for problem in problems for number in problem.numbers]
    targets = [problem.target for problem in problems]
    assert (min(numbers), max(numbers)) == (1, 99)
    assert (min(targets), max(targets)) == (10, 100)


def test_the_same_seed_gives_the_same_problems_and_another_seed_others() -> None:
    config = CountdownConfig(seed=7)
    first = generate_problems(config, 300)
    assert generate_problems(config, 300) == first
    assert generate_problems(config, 500)[:300] == first
    assert generate_problems(replace(config, seed=8), 300) != first


def test_the_stream_of_a_seed_is_pinned() -> None:
    """These are data that people have prepared: a change here changes what their seed means."""
    problems = generate_problems(CountdownConfig(seed=0), 4)
    assert [(problem.numbers, problem.target) for problem in problems] == [
        ((30, 51, 33), 12),
        ((48, 76, 96, 11), 39),
        ((69, 88, 68), 89),
        ((52, 23, 77, 47), 45),
    ]


def test_shown_order_does_not_give_the_solution_away() -> None:
    """The order of the numbers is drawn before the expression, so the first number is not the largest, or the last."""
    problems = generate_problems(CountdownConfig(counts=(3,), seed=5), 3000)
    places = [problem.numbers.index(max(problem.numbers)) for problem in problems]
    for place in range(3):
        # 1000 expected of 3000, give or take 26 (one standard deviation); ties go to the first.
        assert 850 < places.count(place) < 1150


def test_a_range_with_too_few_problems_is_refused_with_the_number_there_are() -> None:
    config = CountdownConfig(counts=(2,), max_number=3, min_target=2, max_target=9)
    # Pairs of 1..3 and their results from 2 up: 11:2, 12:2 3, 13:2 3 4, 22:4, 23:5 6, 33:6 9.
    with pytest.raises(ValueError, match=r"found only 11 of the 20 distinct problems requested"):
        generate_problems(config, 20)
    identities = {problem.identity for problem in generate_problems(config, 11)}
    assert ((2, 3), 6) in identities
    assert ((3, 3), 9) in identities


def test_a_small_range_is_generated_completely() -> None:
    """The generator finds every problem that exists in a small range."""
    config = CountdownConfig(counts=(3,), max_number=4, min_target=1, max_target=20)
    expected = {
        (numbers, int(value))
        for numbers in itertools.combinations_with_replacement(range(1, 5), 3)
        for value in brute_force(numbers)
        if value.denominator == 1 and 1 <= value <= 20
    }
    assert {problem.identity for problem in problem_stream(config)} == expected


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"counts": ()}, "counts is empty"),
        ({"counts": (1,)}, "at least 2"),
        ({"counts": (3, 3)}, "twice"),
        ({"min_number": 0}, "min_number=0"),
        ({"max_number": 0}, "max_number=0"),
        ({"min_target": 0}, "min_target=0"),
        ({"max_target": 9}, "max_target=9"),
        ({"seed": -1}, "seed=-1"),
        ({"counts": (9,)}, "64-bit"),
        ({"counts": (4,), "max_number": 10**6}, "64-bit"),
        ({"counts": (2,), "max_number": 3, "min_target": 19, "max_target": 30}, "is out of reach"),
    ],
)
def test_an_invalid_config_names_the_field(changes: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        replace(CountdownConfig(), **changes).validate()


def test_the_generator_is_exact_at_the_largest_numbers_it_admits() -> None:
    """Four numbers near 2**15 use nearly all of 64 bits; every target is confirmed in exact arithmetic."""
    config = CountdownConfig(counts=(4,), min_number=30_000, max_number=32_700, min_target=1, max_target=90_000)
    for problem in generate_problems(config, 6):
        assert Fraction(problem.target) in brute_force(problem.numbers)


@pytest.mark.parametrize("numbers", [(7,), (3, 5), (2, 2), (1, 3, 8), (4, 4, 4), (3, 3, 8, 8), (1, 5, 5, 5)])
def test_the_solvers_agree_with_brute_force(numbers: tuple[int, ...]) -> None:
    values = brute_force(numbers)
    expected = sorted(int(value) for value in values if value.denominator == 1 and -30 <= value <= 60)
    assert reachable_targets(numbers, -30, 60) == expected
    for target in range(-30, 61):
        assert (solve(numbers, target) is not None) == (target in expected)
    targets = np.arange(-30, 61)
    assert np.flatnonzero(solvable([numbers] * len(targets), targets)).tolist() == [t + 30 for t in expected]


def test_known_problems() -> None:
    # The two famous 24s: only through a fraction.
    assert solve((3, 3, 8, 8), 24) == "8/(3-8/3)"
    assert solve((1, 5, 5, 5), 24) == "(5-1/5)*5"
    assert solve((1, 1, 1, 1), 24) is None
    assert solve((), 1) is None
    assert reachable_targets((1, 2), 0, 10) == [1, 2, 3]


def test_a_random_solution_is_correct_and_varies() -> None:
    rng = random.Random(0)
    solutions = {solve((2, 3, 4, 6), 24, rng) for _ in range(40)}
    assert len(solutions) > 5
    for solution in solutions:
        assert compute_score("countdown_terse", str(solution), {"target": 24, "numbers": [2, 3, 4, 6]}) == 1.0


def test_a_solution_through_zero_is_found() -> None:
    assert solve((4, 4, 9), 0) is not None
    assert solve((4, 4, 9, 9), 0) is not None


def test_random_expressions_use_every_number_once() -> None:
    rng = random.Random(1)
    expressions = {random_expression((3, 7, 5), rng) for _ in range(200)}
    assert len(expressions) > 60
    for expression in expressions:
        digits = sorted(character for character in expression if character.isdigit())
        assert digits == ["3", "5", "7"]
    with pytest.raises(ValueError, match="at least one"):
        random_expression((), rng)


def test_solvable_refuses_what_it_cannot_do_exactly() -> None:
    with pytest.raises(ValueError, match="64-bit"):
        solvable([[10**6] * 4], [1])
    with pytest.raises(ValueError, match="problems, count"):
        solvable([3, 7, 5], [22])
