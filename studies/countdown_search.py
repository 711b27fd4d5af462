"""Countdown with search traces: a response is a list of attempts, ``3+7-2;7*2-3;=7+5*3``, and the last one counts.

The start model writes wrong attempts until it solves, gives up, or is cut off, so failures are much longer than
successes. Task and reward of studies/long-failures.yaml.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any, ClassVar

from hpo_plugin.tasks.countdown import reward
from hpo_plugin.tasks.countdown.problems import random_expression
from hpo_plugin.tasks.countdown.task import Countdown
from hpo_plugin.tasks.task import Demonstration, LaptopForm, Row

SEPARATOR = ";"
#: Longest response, in characters.
LONGEST = 96
#: Share of attempts after which a demonstrated trace ends without a solution.
GIVES_UP = 0.02
#: Most attempts before the solution of a demonstrated trace, and the share of traces with few of them.
FEW, MANY, SHARE_OF_FEW = 3, 14, 0.65


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None, **kwargs: Any
) -> float:
    """Score the last attempt of a trace with the Countdown reward."""
    return reward.compute_score(data_source, _last(solution_str), ground_truth, extra_info, **kwargs)


def _last(trace: str) -> str:
    return trace.rpartition(SEPARATOR)[2]


class CountdownSearch(Countdown):
    """Countdown, answered by a trace of attempts."""

    name: ClassVar[str] = "countdown_search"
    title: ClassVar[str] = "Countdown with search traces"
    laptop: ClassVar[LaptopForm | None] = replace(
        Countdown.laptop,  # type: ignore[type-var]
        quickstart={"counts": (3,), "max_number": 12, "train_size": 2_560},
        response_tokens=LONGEST,
    )

    def judge(self, row: Row, response: str) -> str:
        """Judge the last attempt."""
        return super().judge(row, _last(response))

    def demonstrate(self, row: Row, rng: random.Random) -> Demonstration:
        """Return a solution, and a trace of wrong attempts that ends in it, or gives up."""
        shown = super().demonstrate(row, rng)
        numbers = list(row["reward_model"]["ground_truth"]["numbers"])
        trace, decisions = shown.guess, []
        attempts = rng.randint(1, FEW) if rng.random() < SHARE_OF_FEW else rng.randint(FEW + 1, MANY)
        for _ in range(attempts):
            if rng.random() < GIVES_UP:
                return replace(shown, guess=trace, decisions=tuple(decisions))
            trace += SEPARATOR
            begins = random_expression(numbers, rng)
            decisions.append((len(trace), begins[0]))
            trace += begins
        trace = trace[: decisions[-1][0]] + shown.solution
        kept = tuple(decision for decision in decisions if decision[0] < LONGEST)
        return replace(shown, guess=trace[:LONGEST], decisions=kept)


TASK = CountdownSearch()
