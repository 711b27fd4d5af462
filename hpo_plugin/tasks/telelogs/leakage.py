"""Checks whether a training and a test split share base scenarios.

The published test split is 108 base scenarios times eight counterfactuals. Rows of one scenario are nearly the same
text with different labels, so a split by row would leak; a scenario is recognized by the fields that no counterfactual
changes.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from hpo_plugin.tasks.telelogs.tables import Case


@dataclass(frozen=True)
class Leakage:
    """What two splits have in common.

    Attributes:
        train_scenarios: Base scenarios of the training split.
        test_scenarios: The same of the test split.
        shared_scenarios: Base scenarios that are in both.
        train_rows: Rows of the training split that belong to those.
        test_rows: Rows of the test split that belong to those.
    """

    train_scenarios: int
    test_scenarios: int
    shared_scenarios: int
    train_rows: int
    test_rows: int


def scenario_key(case: Case) -> str:
    """Return what identifies the base scenario of a case: 16 hexadecimal digits.

    Two cases have the same key if their tables are equal up to the fields that a counterfactual changes (speed, serving
    cell, RSRP, throughput, neighbors, resource blocks; positions of cells, their tilts and their PCIs).
    """
    rows = [(row.timestamp, row.longitude, row.latitude, row.sinr) for row in case.drive_test]
    cells = sorted(
        [
            str(
                (
                    cell.gnodeb_id,
                    cell.cell_id,
                    cell.mechanical_azimuth,
                    cell.digital_azimuth,
                    cell.beam_scenario,
                    cell.height,
                    cell.antenna_model,
                )
            )
            for cell in case.cells
        ]
    )
    return hashlib.blake2b(repr((rows, cells)).encode(), digest_size=8).hexdigest()


def compare_splits(train: Iterable[str], test: Iterable[str]) -> Leakage:
    """Compare two splits.

    Args:
        train: :func:`scenario_key` of each row of the training split.
        test: The same of the test split.
    """
    train_rows, test_rows = Counter(train), Counter(test)
    shared = train_rows.keys() & test_rows.keys()
    return Leakage(
        train_scenarios=len(train_rows),
        test_scenarios=len(test_rows),
        shared_scenarios=len(shared),
        train_rows=sum(train_rows[key] for key in shared),
        test_rows=sum(test_rows[key] for key in shared),
    )
