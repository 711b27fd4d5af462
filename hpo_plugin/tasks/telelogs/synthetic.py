"""Synthetic TeleLogs.

Base scenarios come from ``radio``, causes from ``counterfactuals``, and ``rules`` has to agree with every label.
Everything is a function of the seed. A split has base scenarios of its own: it never shares one with another split.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from hpo_plugin.tasks.telelogs.counterfactuals import EDITS
from hpo_plugin.tasks.telelogs.leakage import scenario_key
from hpo_plugin.tasks.telelogs.radio import BaseScenario, BaseScenarios
from hpo_plugin.tasks.telelogs.rules import diagnose
from hpo_plugin.tasks.telelogs.tables import Case, Cause, Option
from hpo_plugin.tasks.telelogs.variants import REDUCTIONS, Reduction, reduce_case, relabel

#: Rows of each class in the published train split, and in the test split.
BALANCES: Final[Mapping[str, Mapping[Cause, int]]] = MappingProxyType(
    {
        "train": MappingProxyType(dict(zip(Cause, (264, 320, 330, 283, 352, 225, 349, 277), strict=True))),
        "uniform": MappingProxyType(dict.fromkeys(Cause, 108)),
    }
)
#: Times a cause is drawn for a scenario before the scenario is given up.
ATTEMPTS: Final = 4
#: Scenarios given up one after another before the generator does: what is asked for shows in none then.
SCENARIO_ATTEMPTS: Final = 1_000
#: Seeds are below it: a split's stream of base scenarios is numbered by 32 bits, which hold seed and split.
SEED_LIMIT: Final = 2**31
#: Streams of base scenarios, one for each split.
SPLITS: Final = ("train", "test")

#: Called with (how many rows there are, how many there will be).
RowProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class SyntheticRow:
    """One question with its answer.

    Attributes:
        case: The case.
        cause: Its root cause; the oracle agrees.
        scenario: What identifies its base scenario (:func:`~hpo_plugin.tasks.telelogs.leakage.scenario_key`).
    """

    case: Case
    cause: Cause
    scenario: str

    @property
    def label(self) -> str:
        """The answer."""
        label = self.case.label_of(self.cause)
        assert label is not None
        return label


@dataclass(frozen=True)
class SyntheticRows:
    """Result of :func:`generate`.

    Attributes:
        rows: In random order.
        scenarios: Base scenarios behind them.
        candidates_drawn: Candidates of the radio simulation drawn for them; the others had no clean handover.
        redrawn: Rows that the oracle labeled otherwise, by (intended cause, oracle's cause); they were drawn again.
        scenarios_given_up: Scenarios replaced by others because a cause failed on them :data:`ATTEMPTS` times.
    """

    rows: Sequence[SyntheticRow]
    scenarios: int
    candidates_drawn: int
    redrawn: Mapping[tuple[Cause, Cause | None], int]
    scenarios_given_up: int


def class_counts(size: int, balance: str, causes: Sequence[Cause] = tuple(Cause)) -> dict[Cause, int]:
    """Return how many of ``size`` rows each cause gets: proportional, rounded by largest remainder.

    Args:
        size: Rows in all.
        balance: ``train`` (the published train split's shares) or ``uniform``.
        causes: The causes to share it among.

    Raises:
        ValueError: If the balance is unknown or a cause would get no row.
    """
    if balance not in BALANCES:
        raise ValueError(f"balance={balance!r} is not one of {', '.join(BALANCES)}")
    weights = {cause: BALANCES[balance][cause] for cause in causes}
    total = sum(weights.values())
    counts = {cause: size * weight // total for cause, weight in weights.items()}
    by_remainder = sorted(causes, key=lambda cause: -(size * weights[cause] % total))
    for cause in by_remainder[: size - sum(counts.values())]:
        counts[cause] += 1
    if min(counts.values()) < 1:
        raise ValueError(f"size={size} leaves a root cause without a row; set at least {len(weights)}")
    return counts


def generate(
    size: int,
    *,
    split: str = "train",
    balance: str = "uniform",
    seed: int = 0,
    reduction: Reduction | None = None,
    progress: RowProgress | None = None,
) -> SyntheticRows:
    """Generate a split.

    Args:
        size: Rows.
        split: ``train`` or ``test``; they share no base scenario.
        balance: ``train`` (the published train split's class shares) or ``uniform``.
        seed: 0 to 2**31 - 1.
        reduction: What each row keeps; everything by default.
        progress: Receives the number of rows so far and the total.

    Returns:
        The rows, each agreed on by the oracle, and what was drawn again.

    Raises:
        ValueError: If an argument is invalid, or the reduction removes what identifies one of its causes.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {', '.join(SPLITS)}")
    if not 0 <= seed < SEED_LIMIT:
        raise ValueError(f"seed={seed} must be in [0, {SEED_LIMIT - 1}]")
    reduction = REDUCTIONS["full"] if reduction is None else reduction
    reduction.validate()
    counts = class_counts(size, balance, reduction.causes)
    shuffler = random.Random(f"{seed}/{split}/classes")
    scenario_count = max(counts.values())
    causes_of: list[list[Cause]] = [[] for _ in range(scenario_count)]
    for cause, count in counts.items():
        for place in shuffler.sample(range(scenario_count), count):
            causes_of[place].append(cause)
    stream = BaseScenarios(2 * seed + SPLITS.index(split))
    options = tuple(Option(cause.value, cause) for cause in Cause if cause in reduction.causes)
    redrawn: Counter[tuple[Cause, Cause | None]] = Counter()
    given_up = 0
    rows: list[SyntheticRow] = []
    for causes in causes_of:
        for _ in range(SCENARIO_ATTEMPTS):
            made = _counterfactuals(next(stream), causes, options, reduction, f"{seed}/{split}", redrawn)
            if made is not None:
                break
            given_up += 1
        else:
            (cause, found), _ = redrawn.most_common(1)[0]
            raise ValueError(
                f"none of {SCENARIO_ATTEMPTS} scenarios shows {cause.value}: after the reduction, the rules find "
                f"{'no cause' if found is None else found.value}. Keep the rows and columns that {cause.value} needs"
            )
        rows += made
        if progress is not None:
            progress(len(rows), size)
    random.Random(f"{seed}/{split}/order").shuffle(rows)
    return SyntheticRows(rows, scenario_count, stream.drawn, redrawn, given_up)


def _counterfactuals(
    base: BaseScenario,
    causes: Sequence[Cause],
    options: tuple[Option, ...],
    reduction: Reduction,
    stream: str,
    redrawn: Counter[tuple[Cause, Cause | None]],
) -> list[SyntheticRow] | None:
    """Return a row for each cause, or None if the scenario is unfit for one; count the rows drawn again."""
    made = []
    scenario = scenario_key(Case(base.drive_test, base.cells))
    for cause in causes:
        for attempt in range(ATTEMPTS):
            drive_test, cells = EDITS[cause](base, random.Random(f"{stream}/{base.number}/{cause.value}/{attempt}"))
            case = Case(drive_test, cells, options)
            found = diagnose(case).cause
            if found is cause and reduction != REDUCTIONS["full"]:
                case = reduce_case(case, reduction)
                found = diagnose(case).cause
            if found is cause:
                made.append(SyntheticRow(case, cause, scenario))
                break
            redrawn[cause, found] += 1
        else:
            return None
    return made


def relabeled(rows: Sequence[SyntheticRow], seed: int = 0) -> list[SyntheticRow]:
    """Return rows under random labels, options and order of tables: a test of generalization.

    Args:
        rows: The rows.
        seed: Decides the labels.

    Raises:
        ValueError: If the oracle no longer agrees on a row, which no relabeling can cause.
    """
    changed = []
    for number, row in enumerate(rows):
        case = relabel(row.case, row.cause, random.Random(f"{seed}/relabel/{number}"))
        if diagnose(case).cause is not row.cause:
            raise ValueError(f"row {number}: relabeling changed the diagnosis of {row.cause.value}")
        changed.append(SyntheticRow(case, row.cause, row.scenario))
    return changed
