"""The Countdown task: options, laptop form, demonstrations and explanations."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from hpo_plugin.console import Progress
from hpo_plugin.tasks.countdown.dataset import prepare_countdown, to_row
from hpo_plugin.tasks.countdown.problems import (
    CountdownConfig,
    join,
    random_expression,
    solve,
)
from hpo_plugin.tasks.countdown.prompts import prompt_text
from hpo_plugin.tasks.countdown.reward import DATA_SOURCES, compute_score, judge, read_ground_truth
from hpo_plugin.tasks.task import (
    DataOptions,
    DataSet,
    Demonstration,
    Explanation,
    LaptopForm,
    Row,
    Task,
    ground_truth_of,
    option,
)

#: What an answer of the calculated kind begins with.
CALCULATED_PREFIX = "="
#: The time of a search grows steeply with the count of numbers.
MAX_EXPLAINED_COUNT = 6


@dataclass(frozen=True)
class CountdownOptions(DataOptions):
    """Options of Countdown data. ``None`` means the default of :class:`CountdownConfig`, or no restriction of a source.

    Attributes:
        train_size: Rows of the training split.
        test_size: Rows of the test split.
        counts: How many numbers a problem has.
        layout: Wording of the prompts: ``public`` or ``terse``.
        min_number: Smallest given number.
        max_number: Largest given number.
        min_target: Smallest target.
        max_target: Largest target.
        source: ``synthetic``, a file, or a data set on the Hugging Face hub.
    """

    train_size: int | None = option("Rows in the training split. Default: 20000, or 327680 for a source.", minimum=1)
    test_size: int | None = option("Rows in the test split. Default: 1024.", minimum=1)
    counts: tuple[int, ...] | None = option(
        "Count of numbers in a problem. Repeat the option for a mixture. Default: 3 and 4. With --source FILE or "
        "HUB_ID: keep only rows with this count.",
        flag="--numbers",
    )
    layout: str = option("public: TinyZero's wording and <answer> tags; terse: '3 7 5=22:' for small models.", "public")
    min_number: int | None = option("Smallest given number. Default: 1.")
    max_number: int | None = option("Largest given number. Default: 99.")
    min_target: int | None = option("Smallest target. Default: 10.")
    max_target: int | None = option("Largest target. Default: 100.")
    source: str = option(
        "synthetic, a local .parquet/.json/.jsonl/.csv file, or a data set on the Hugging Face Hub, such as "
        "Jiayi-Pan/Countdown-Tasks-3to4 (its published split is kept).",
        "synthetic",
    )


class Countdown(Task):
    """Reach a target from given numbers, each used once, with + - * / and parentheses."""

    name: ClassVar[str] = "countdown"
    title: ClassVar[str] = "Countdown"
    Options: ClassVar[type[DataOptions]] = CountdownOptions
    laptop: ClassVar[LaptopForm | None] = LaptopForm(
        config_name="countdown_cpu",
        steps=60,
        data={"layout": "terse"},
        # Within reach of a model of 200,000 parameters: 80 batches of 32 problems; there are 3,289 in all.
        quickstart={"counts": (3,), "max_number": 12, "train_size": 2_560},
        solution_prefix=CALCULATED_PREFIX,
    )

    def prepare(
        self, directory: Path, options: Any, *, force: bool = False, progress: Progress | None = None
    ) -> DataSet:
        """Write Countdown problems; the training and the test split share none of them.

        Raises:
            ValueError: An option is invalid or has no effect with this source.
            OSError: The source cannot be read, or the directory cannot be written or holds other data.
        """
        given: CountdownOptions = options
        config = _synthetic(given)
        only_counts = () if config is not None else tuple(given.counts or ())
        return prepare_countdown(
            directory,
            config=config,
            layout=given.layout,
            train_size=given.train_size,
            test_size=given.test_size,
            source=given.source,
            only_counts=only_counts,
            force=force,
            progress=progress,
        )

    def validate(self, options: Any) -> None:
        """Check the ranges of synthetic problems."""
        config = _synthetic(options)
        if config is not None:
            config.validate()

    def score(self, row: Row, response: str) -> Mapping[str, Any]:
        """Score a response with the default settings of the reward."""
        return {"score": compute_score(row["data_source"], response, row["reward_model"]["ground_truth"])}

    def judge(self, row: Row, response: str) -> str:
        """Return the :class:`~hpo_plugin.tasks.countdown.reward.CountdownVerdict` of a response."""
        layout = {source: layout for layout, source in DATA_SOURCES.items()}[row["data_source"]]
        return judge(response, row["reward_model"]["ground_truth"], layout=layout).value

    def identity(self, row: Row) -> Any:
        """Return the numbers in ascending order, and the target."""
        target, numbers = read_ground_truth(row["reward_model"]["ground_truth"])
        return [list(numbers), target]

    def key(self, row: Row) -> Any:
        """Return the numbers in the order shown, and the target."""
        given = row["reward_model"]["ground_truth"]
        return [list(given["numbers"]), given["target"]]

    def demonstrate(self, row: Row, rng: random.Random) -> Demonstration:
        """Return a solution (``=3*5+7``) and a random expression of the numbers (``(7-3)*5``), the numbers shuffled.

        Raises:
            ValueError: The problem has no solution.
        """
        target, given = read_ground_truth(row["reward_model"]["ground_truth"])
        numbers = sorted(given)
        rng.shuffle(numbers)
        return Demonstration(
            prompt=prompt_text(numbers, target, "terse"),
            solution=CALCULATED_PREFIX + _solution(tuple(numbers), target),
            guess=random_expression(numbers, rng),
        )

    def explain(self, row: Row) -> Explanation:
        """Return a solution, found by search over all expressions.

        Raises:
            ValueError: The problem is malformed or too large to search.
        """
        target, numbers = read_ground_truth(ground_truth_of(row))
        if len(numbers) > MAX_EXPLAINED_COUNT:
            raise ValueError(
                f"{len(numbers)} numbers are too many for the search; at most {MAX_EXPLAINED_COUNT} are supported"
            )
        found = solve(numbers, target)
        shown = f"{', '.join(map(str, numbers))} → {target}"
        if found is None:
            return Explanation(None, f"{shown}: no expression of these numbers has this value")
        return Explanation(found, f"{shown}: {found} = {target}", text=f"{found} = {target}")

    def read_row(self, columns: Mapping[str, Any]) -> Row:
        """Accept a row in verl's format, or the columns ``nums`` (or ``numbers``) and ``target``."""
        if columns.get("prompt") is None and {"nums", "numbers"} & columns.keys():
            from hpo_plugin.tasks.countdown.dataset import read_problem

            return to_row(read_problem(columns), "test", 0)
        return super().read_row(columns)

    def group(self, ground_truth: Any) -> str | None:
        """Return the count of numbers."""
        _, numbers = read_ground_truth(ground_truth)
        return f"{len(numbers)} numbers"


def _synthetic(given: CountdownOptions) -> CountdownConfig | None:
    """Return what to generate; None for another source."""
    names = ("min_number", "max_number", "min_target", "max_target", "seed")
    ranges: dict[str, Any] = {name: value for name in names if (value := getattr(given, name)) is not None}
    if given.source == "synthetic":
        if given.counts:
            ranges["counts"] = tuple(given.counts)
        return CountdownConfig(**ranges)
    if ranges:
        named = ", ".join(f"{name}={value}" for name, value in ranges.items())
        raise ValueError(
            f"{named} applies only to synthetic problems and has no effect with source={given.source!r}; remove it"
        )
    return None


def shown_order_solution(numbers: Sequence[int], target: int) -> str:
    """Return a solution that keeps the numbers in the order in which they are shown, as far as possible.

    A function of its arguments in which most numbers are copied in their order is learned from far fewer demonstrations
    than a solution of a solver's choice.

    Args:
        numbers: The numbers; all their orders are tried, so at most five or so.
        target: The value to reach.

    Raises:
        ValueError: There is no solution.
    """
    for order in itertools.permutations(numbers):
        for value, (text, _) in _expressions(order):
            if value == target:
                return text
    raise ValueError(
        f"no expression of the numbers {list(numbers)} equals {target}, so there is no solution to demonstrate"
    )


@cache
def _solution(numbers: tuple[int, ...], target: int) -> str:
    return shown_order_solution(numbers, target)


def _expressions(numbers: Sequence[int]) -> Iterator[tuple[Fraction, tuple[str, int]]]:
    """Yield value and text of every expression of the numbers in this order."""
    if len(numbers) == 1:
        yield Fraction(numbers[0]), (str(numbers[0]), 3)
    # Left to right first: those expressions need the fewest parentheses.
    for split in range(len(numbers) - 1, 0, -1):
        for a, left in _expressions(numbers[:split]):
            for b, right in _expressions(numbers[split:]):
                yield a + b, join("+", left, right)
                yield a - b, join("-", left, right)
                yield a * b, join("*", left, right)
                if b:
                    yield a / b, join("/", left, right)


#: The task.
TASK = Countdown()
