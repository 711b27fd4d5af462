"""The eight edits that give a base scenario its root cause, as they were recovered from the published test split.

Each edit is a function of a base scenario and a random number generator; it returns the changed drive test and cells.
What it does not name stays. A and B are the cells before and after the handover at row h; W is the dip, rows h-2 to
h+1.

One thing is not copied. In the published C6 rows the engineering parameters list an unrelated PCI for B, so that a
model can tell C6 by a serving PCI without a row in the table; here B is renumbered in both tables.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from types import MappingProxyType
from typing import Final

import numpy as np

from hpo_plugin.tasks.telelogs.radio import BaseScenario, inverse_cdf
from hpo_plugin.tasks.telelogs.rules import (
    EARTH_RADIUS,
    LOBE_DEFICIT,
    WEAK_RSRP,
    lobe_deficit,
)
from hpo_plugin.tasks.telelogs.tables import Cause, DriveTestRow, Neighbor, RadioCell, Value

Tables = tuple[tuple[DriveTestRow, ...], tuple[RadioCell, ...]]

#: (share, degrees): quantiles of the lobe deficit of C1. Those at 10, 50 and 90 % are the published data's.
LOBE_DEFICITS: Final = ((0.0, 0.0), (0.1, 0.4), (0.25, 1.0), (0.27, LOBE_DEFICIT), (0.5, 5.3), (0.9, 8.5), (1.0, 11.0))
#: Share of base scenarios in which the edit of C1 makes coverage weak; only there can a small deficit be the cause.
WEAK_SHARE: Final = 0.40

_TWO_DIGITS = Decimal("0.01")
_SIX_DIGITS = Decimal("0.000001")


def steep_beam(base: BaseScenario, rng: random.Random) -> Tables:
    """C1: before h everything is 5 dB weaker, and the beam of A points further down."""
    rows = list(base.drive_test)
    for number in range(base.handover):
        row = rows[number]
        neighbors = tuple(
            neighbor if neighbor.brsrp is None else Neighbor(neighbor.pci, neighbor.brsrp - 5)
            for neighbor in row.neighbors
        )
        rows[number] = replace(row, rsrp=None if row.rsrp is None else row.rsrp - 5, neighbors=neighbors)
    before = [rows[number] for number in base.dip if number < base.handover]
    weak = any(row.rsrp is not None and row.rsrp <= WEAK_RSRP for row in before)
    cell = replace(base.cells[base.first], digital_tilt=Decimal(9), mechanical_downtilt=Decimal(0))
    # A deficit too small for the last rung of the ladder needs weak coverage: all of them go to those scenarios.
    small = next(share for share, degrees in LOBE_DEFICITS if degrees >= LOBE_DEFICIT)
    share = rng.uniform(0, small) if weak and rng.random() < small / WEAK_SHARE else rng.uniform(small, 1)
    wanted = float(inverse_cdf(LOBE_DEFICITS, np.asarray(share)))
    flat = max(deficit for row in before if (deficit := lobe_deficit(row, cell)) is not None)
    # Tilts are whole degrees, so the deficit keeps its fraction; it is positive.
    tilt = math.floor(-flat) + 1 + math.floor(wanted)
    now = base.cells[base.first].mechanical_downtilt or Decimal(0)
    cell = replace(cell, mechanical_downtilt=max(now, Decimal(tilt)))
    return tuple(rows), _with(base.cells, {base.first: cell})


def overshooting(base: BaseScenario, rng: random.Random) -> Tables:
    """C2: in W the second neighbor serves, and stands 0.03 degrees further east; other cells shift by 13 to 43 m.

    The cells of a site shift together: else only C2 would have colocated cells at different positions.
    """
    rows = _edit_dip(base, _swap_with_second)
    cells = list(base.cells)
    shifts: dict[str | None, tuple[Decimal, Decimal]] = {}
    for index, cell in enumerate(cells):
        if index == base.far:
            cells[index] = _moved(cell, Decimal("0.03"), Decimal(0))
            continue
        if cell.gnodeb_id not in shifts:
            bearing, meters = rng.uniform(0, 2 * math.pi), rng.uniform(13, 43)
            north = math.degrees(meters / EARTH_RADIUS) * math.cos(bearing)
            east = math.degrees(meters / EARTH_RADIUS) * math.sin(bearing) / math.cos(math.radians(cell.latitude or 0))
            shifts[cell.gnodeb_id] = Decimal(f"{east:.6f}"), Decimal(f"{north:.6f}")
        cells[index] = _moved(cell, *shifts[cell.gnodeb_id])
    return rows, tuple(cells)


def better_neighbor(base: BaseScenario, rng: random.Random) -> Tables:
    """C3: at h and h+1 throughput is 200 higher; in W the strongest neighbor comes within U(2, 5) dB."""
    rows = list(_edit_dip(base, lambda row: _lifted(row, weaker_than=5, low=2, high=5, rng=rng)))
    for number in (base.handover, base.handover + 1):
        throughput = rows[number].throughput
        rows[number] = replace(rows[number], throughput=None if throughput is None else throughput + 200)
    return tuple(rows), base.cells


def overlapping_coverage(base: BaseScenario, rng: random.Random) -> Tables:
    """C4: in W the strongest neighbor is one of another site, within U(2, 3) dB."""

    def edit(row: DriveTestRow) -> DriveTestRow:
        first, second, *rest = row.neighbors
        swapped = (Neighbor(second.pci, first.brsrp), Neighbor(first.pci, second.brsrp), *rest)
        return _lifted(replace(row, neighbors=swapped), weaker_than=3, low=2, high=3, rng=rng)

    return _edit_dip(base, edit), base.cells


def handovers(base: BaseScenario, rng: random.Random) -> Tables:
    """C5: the serving cells of W are A, B, A, B."""
    rows = list(base.drive_test)
    for number in (base.handover - 1, base.handover):
        rows[number] = _swap_with_first(rows[number])
    return tuple(rows), base.cells


def pci_mod_30(base: BaseScenario, rng: random.Random) -> Tables:
    """C6: B is renumbered to A + 120 (or A - 780); in W the strongest neighbor comes within U(5, 6) dB."""
    first, second = base.cells[base.first].pci, base.cells[base.second].pci
    assert first is not None
    number = first + 120 if first + 120 <= 1007 else first - 780

    def renumbered(pci: Value) -> Value:
        return number if pci == second else pci

    rows = [
        replace(
            row,
            pci=renumbered(row.pci),
            neighbors=tuple(Neighbor(renumbered(neighbor.pci), neighbor.brsrp) for neighbor in row.neighbors),
        )
        for row in base.drive_test
    ]
    for place in base.dip:
        rows[place] = _lifted(rows[place], weaker_than=6, low=5, high=6, rng=rng)
    return tuple(rows), _with(base.cells, {base.second: replace(base.cells[base.second], pci=number)})


def speed(base: BaseScenario, rng: random.Random) -> Tables:
    """C7: in W the car is 40 km/h faster."""
    return _edit_dip(base, lambda row: replace(row, speed=None if row.speed is None else row.speed + 40)), base.cells


def resource_blocks(base: BaseScenario, rng: random.Random) -> Tables:
    """C8: in W half as many resource blocks are scheduled."""
    return (
        _edit_dip(base, lambda row: replace(row, rbs=None if row.rbs is None else (row.rbs / 2).quantize(_TWO_DIGITS))),
        base.cells,
    )


#: Root cause -> its edit.
EDITS: Final[Mapping[Cause, Callable[[BaseScenario, random.Random], Tables]]] = MappingProxyType(
    {
        Cause.C1: steep_beam,
        Cause.C2: overshooting,
        Cause.C3: better_neighbor,
        Cause.C4: overlapping_coverage,
        Cause.C5: handovers,
        Cause.C6: pci_mod_30,
        Cause.C7: speed,
        Cause.C8: resource_blocks,
    }
)


def _edit_dip(base: BaseScenario, edit: Callable[[DriveTestRow], DriveTestRow]) -> tuple[DriveTestRow, ...]:
    dip = base.dip
    return tuple(edit(row) if number in dip else row for number, row in enumerate(base.drive_test))


def _swap_with_first(row: DriveTestRow) -> DriveTestRow:
    first, *rest = row.neighbors
    return replace(row, pci=first.pci, neighbors=(Neighbor(row.pci, first.brsrp), *rest))


def _swap_with_second(row: DriveTestRow) -> DriveTestRow:
    first, second, *rest = row.neighbors
    return replace(row, pci=second.pci, neighbors=(first, Neighbor(row.pci, second.brsrp), *rest))


def _lifted(row: DriveTestRow, *, weaker_than: int, low: float, high: float, rng: random.Random) -> DriveTestRow:
    """Lift the strongest neighbor to RSRP - U(low, high) where it is more than ``weaker_than`` dB weaker."""
    first, *rest = row.neighbors
    # Drawn in any case: what one row draws does not depend on another.
    lifted = Decimal(f"{rng.uniform(low, high):.2f}")
    if row.rsrp is None or first.brsrp is None or first.brsrp >= row.rsrp - weaker_than:
        return row
    return replace(row, neighbors=(Neighbor(first.pci, row.rsrp - lifted), *rest))


def _moved(cell: RadioCell, east: Decimal, north: Decimal) -> RadioCell:
    return replace(
        cell,
        longitude=None if cell.longitude is None else (cell.longitude + east).quantize(_SIX_DIGITS),
        latitude=None if cell.latitude is None else (cell.latitude + north).quantize(_SIX_DIGITS),
    )


def _with(cells: Sequence[RadioCell], changed: Mapping[int, RadioCell]) -> tuple[RadioCell, ...]:
    return tuple(changed.get(index, cell) for index, cell in enumerate(cells))
