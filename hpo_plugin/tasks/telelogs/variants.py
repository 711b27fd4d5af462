"""Other forms of the same case: relabeled, and reduced.

*Relabeled*: the options in another order, under other labels, fewer of them, the tables swapped. A model that learned
"C7 means speed" instead of reading the options has no way to know these, so they make a test of generalization.

*Reduced*: fewer rows, cells, columns and options, for models and machines far too small for five thousand characters.
It is a parameter of the same generator: the case stays a case, read by the same rules, written by the same renderer.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from types import MappingProxyType
from typing import Final

from hpo_plugin.tasks.telelogs.prompts import WORDINGS
from hpo_plugin.tasks.telelogs.rules import Situation
from hpo_plugin.tasks.telelogs.tables import (
    CELL_COLUMNS,
    DRIVE_TEST_COLUMNS,
    MAX_NEIGHBORS,
    Case,
    Cause,
    DriveTestRow,
    Neighbor,
    Option,
    Value,
)

#: Fewest options of a relabeled case.
MIN_OPTIONS: Final = 5
_LETTERS: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def relabel(case: Case, cause: Cause, rng: random.Random) -> Case:
    """Return a case under random labels, with five to eight options in any order and either table first.

    Args:
        case: The case.
        cause: Its root cause, which stays on offer.
        rng: Decides everything.
    """
    others = [option.cause for option in case.options if option.cause is not cause]
    count = rng.randint(min(MIN_OPTIONS, len(case.options)), len(case.options))
    causes = [cause, *rng.sample(others, count - 1)]
    rng.shuffle(causes)
    if rng.random() < 0.5:
        labels = [str(number + 1) for number in range(count)]
    else:
        # Digits differ, so that a bare number names one option.
        labels = [rng.choice(_LETTERS) + digit for digit in rng.sample("123456789", count)]
    options = tuple(Option(label, offered) for label, offered in zip(labels, causes, strict=True))
    return replace(case, options=options, layout=replace(case.layout, cells_first=rng.random() < 0.5))


@dataclass(frozen=True)
class Reduction:
    """What a reduced case keeps.

    Attributes:
        causes: Root causes that are generated and offered.
        rows: Rows of the drive test, those of the dip among them.
        cells: Most rows of the engineering parameters: serving cells first, then neighbors by strength.
        drive_test_columns: Columns of the drive test, by field.
        cell_columns: Columns of the engineering parameters, by field.
        wording: ``full`` or ``terse``.
        decimals: Decimals that the numbers of the drive test are rounded to; None leaves them.
    """

    causes: tuple[Cause, ...] = tuple(Cause)
    rows: int = 10
    cells: int = 13
    drive_test_columns: tuple[str, ...] = DRIVE_TEST_COLUMNS
    cell_columns: tuple[str, ...] = CELL_COLUMNS
    wording: str = "full"
    decimals: int | None = None

    def validate(self) -> None:
        """Check it.

        Raises:
            ValueError: Naming the field, its value and what to do.
        """
        if not 4 <= self.rows <= 10:
            raise ValueError(f"rows={self.rows} must be in [4, 10]: the dip has 4 rows, and a drive test has 10")
        if self.cells < 1:
            raise ValueError(f"cells={self.cells} must be at least 1")
        if Cause.C3 not in self.causes:
            raise ValueError("causes must contain C3, which applies when no other rule holds")
        for name, columns, known in (
            ("drive_test_columns", self.drive_test_columns, DRIVE_TEST_COLUMNS),
            ("cell_columns", self.cell_columns, CELL_COLUMNS),
        ):
            if not columns:
                raise ValueError(f"{name} must name at least one column")
            unknown = [column for column in columns if column not in known]
            if unknown:
                raise ValueError(f"{name}: {unknown[0]!r} is not one of {', '.join(known)}")
        if self.decimals is not None and self.decimals < 0:
            raise ValueError(f"decimals={self.decimals} must not be negative")
        if self.wording not in WORDINGS:
            raise ValueError(f"wording={self.wording!r} is not one of {', '.join(WORDINGS)}")


#: ``full`` keeps everything. ``laptop`` keeps what distinguishes five causes, in some 130 characters.
REDUCTIONS: Final[Mapping[str, Reduction]] = MappingProxyType(
    {
        "full": Reduction(),
        "laptop": Reduction(
            causes=(Cause.C3, Cause.C5, Cause.C6, Cause.C7, Cause.C8),
            rows=4,
            cells=2,
            drive_test_columns=("speed", "pci", "throughput", "neighbor_1_pci", "rbs"),
            cell_columns=("gnodeb_id", "pci"),
            wording="terse",
            decimals=0,
        ),
    }
)


def reduce_case(case: Case, reduction: Reduction) -> Case:
    """Return a case with fewer rows, cells, columns and options.

    Args:
        case: The case.
        reduction: What to keep. The rows kept are contiguous, with the four of the dip in the middle if possible.

    Returns:
        The reduced case. Whether its rules still find the same cause is for the caller to check.
    """
    situation = Situation(case)
    first = situation.affected[0][0] if situation.affected else 0
    begin = max(0, min(first - (reduction.rows - 4) // 2, len(case.drive_test) - reduction.rows))
    rows = case.drive_test[begin : begin + reduction.rows]
    ranked = [row.pci for row in rows]
    for place in range(max((len(row.neighbors) for row in rows), default=0)):
        ranked += [row.neighbors[place].pci for row in rows if place < len(row.neighbors)]
    wanted = [pci for pci in dict.fromkeys(ranked) if pci is not None][: reduction.cells]
    hidden = dict.fromkeys(name for name in CELL_COLUMNS if name not in reduction.cell_columns)
    cells = tuple(replace(cell, **hidden) for cell in case.cells if cell.pci in wanted)
    kept = set(reduction.drive_test_columns)
    # For each neighbor up to the last one shown: whether its PCI is, and its BRSRP.
    shown = [
        (f"neighbor_{place}_pci" in kept, f"neighbor_{place}_brsrp" in kept) for place in range(1, MAX_NEIGHBORS + 1)
    ]
    while shown and not any(shown[-1]):
        shown.pop()
    dropped_fields = [name for name in DRIVE_TEST_COLUMNS if not name.startswith("neighbor_") and name not in kept]
    shown_rows = tuple(
        replace(
            row,
            neighbors=tuple(
                Neighbor(neighbor.pci if pci else None, neighbor.brsrp if brsrp else None)
                for neighbor, (pci, brsrp) in zip(row.neighbors, shown, strict=False)
            ),
            **dict.fromkeys(dropped_fields),
        )
        for row in rows
    )
    if reduction.decimals is not None:
        shown_rows = tuple(_rounded(row, Decimal(1).scaleb(-reduction.decimals)) for row in shown_rows)
    return Case(
        drive_test=shown_rows,
        cells=cells,
        options=tuple(option for option in case.options if option.cause in reduction.causes),
        layout=replace(
            case.layout,
            wording=reduction.wording,
            drive_test_columns=tuple(name for name in case.layout.drive_test_columns if name in kept),
            cell_columns=tuple(name for name in case.layout.cell_columns if name in reduction.cell_columns),
        ),
    )


def _rounded(row: DriveTestRow, unit: Decimal) -> DriveTestRow:
    neighbors = tuple(Neighbor(neighbor.pci, _round(neighbor.brsrp, unit)) for neighbor in row.neighbors)
    return replace(
        row,
        neighbors=neighbors,
        speed=_round(row.speed, unit),
        rsrp=_round(row.rsrp, unit),
        sinr=_round(row.sinr, unit),
        throughput=_round(row.throughput, unit),
        rbs=_round(row.rbs, unit),
    )


def _round(value: Value, unit: Decimal) -> Value:
    # Plus zero, which has no sign.
    return None if value is None else value.quantize(unit) + 0
