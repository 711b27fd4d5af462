"""The diagnostic ladder behind the labels of TeleLogs: eight rules, tried in a fixed order.

Each rule is a function of a case's typed tables (as a :class:`Situation`) and returns a :class:`RuleResult`: whether it
holds, and the rows, cells and values that say so. :func:`diagnose` climbs the ladder and stops at the first rule that
holds; it is the oracle of the synthetic data and of the tests, and ``hpo-plugin explain telelogs`` prints what it
found.

The order, from the first rung to the last: C2 coverage distance, C5 handovers, C7 speed, C8 resource blocks, C1 weak
coverage under a steep beam, C6 PCI mod 30, C4 overlapping coverage, C1 steep beam alone, C3 if nothing else holds.

A row is *affected* when its throughput is below :data:`THROUGHPUT`. A value that is missing, or a column that the
prompt does not have, is left out: it never counts toward a rule.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import pairwise
from typing import Final

from hpo_plugin.tasks.telelogs.tables import Case, Cause, DriveTestRow, Neighbor, RadioCell

#: Mbps. A row with less is affected.
THROUGHPUT: Final = 600
#: Meters between an affected row and its serving cell (C2).
COVERAGE_DISTANCE: Final = 1000
#: Changes of the serving cell (C5).
HANDOVERS: Final = 3
#: km/h (C7).
SPEED: Final = 40
#: Resource blocks, the mean of the affected rows (C8).
RESOURCE_BLOCKS: Final = 160
#: dBm: coverage is weak at or below (C1, first rung).
WEAK_RSRP: Final = -90
#: Degrees by which the upper edge of the beam may stay below the direction of the row (C1, second rung).
LOBE_DEFICIT: Final = 2.5
#: Pairs of a row and a neighbor that share the PCI modulo 30 with the serving cell (C6): more than so many.
PCI_MODULUS: Final = 30
PCI_PAIRS: Final = 2
#: dB: a neighbor overlaps if it is at most so much weaker than the serving cell (C4) ...
OVERLAP: Final = 3
#: ... and pairs of a row and such a neighbor: more than so many.
OVERLAP_PAIRS: Final = 2
#: The value of Digital Tilt that stands for the default, and what it stands for, in degrees.
DEFAULT_TILT_CODE: Final = 255
DEFAULT_TILT: Final = 6
#: Meters.
EARTH_RADIUS: Final = 6_371_000.0

_SCENARIO = re.compile("SCENARIO_([1-9][0-9]{0,3})")


@dataclass(frozen=True, slots=True)
class RuleResult:
    """What one rule found.

    Attributes:
        cause: The root cause the rule speaks for.
        rule: Name of the rule.
        holds: Whether it holds.
        rows: Numbers of the rows of the drive test that say so, from 0; where the rule does not hold, those it judged.
        cells: Indices into the case's cells, selected in the same way.
        values: What was measured, by name; in the units of the thresholds.
        threshold: The threshold it was compared with; None for the last rung.
        template: A sentence about the values, for :meth:`sentence`.
    """

    cause: Cause
    rule: str
    holds: bool
    rows: tuple[int, ...] = ()
    cells: tuple[int, ...] = ()
    values: Mapping[str, float] = field(default_factory=dict)
    threshold: float | None = None
    template: str = ""

    def sentence(self) -> str:
        """Return the result as a sentence with its numbers."""
        if not self.values:
            return "there is no row that this rule can judge" if self.threshold is not None else self.template
        return self.template.format(**self.values, threshold=self.threshold)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The outcome of the ladder.

    Attributes:
        label: The answer: the label under which the case offers the cause; None if it offers none that holds.
        cause: The root cause; None if no offered cause holds.
        evidence: Result of the deciding rule; None if no offered cause holds.
        results: Result of every rule that was tried, in the order of the ladder, the deciding one last.
    """

    label: str | None
    cause: Cause | None
    evidence: RuleResult | None
    results: tuple[RuleResult, ...]


# --- geometry ------------------------------------------------------------------------------------------------------


def distance(row: DriveTestRow, cell: RadioCell) -> float | None:
    """Return the great-circle distance (haversine) from a row to a cell in meters; None without a position."""
    if row.longitude is None or row.latitude is None or cell.longitude is None or cell.latitude is None:
        return None
    latitude_1, latitude_2 = math.radians(row.latitude), math.radians(cell.latitude)
    half_latitude = (latitude_2 - latitude_1) / 2
    half_longitude = math.radians(cell.longitude - row.longitude) / 2
    chord = math.sin(half_latitude) ** 2 + math.cos(latitude_1) * math.cos(latitude_2) * math.sin(half_longitude) ** 2
    # Rounding can leave the square of a sine outside of [0, 1].
    return 2 * EARTH_RADIUS * math.asin(math.sqrt(min(max(chord, 0.0), 1.0)))


def downtilt(cell: RadioCell) -> float | None:
    """Return mechanical plus digital downtilt in degrees, or None where one is missing."""
    if cell.mechanical_downtilt is None or cell.digital_tilt is None:
        return None
    digital = DEFAULT_TILT if cell.digital_tilt == DEFAULT_TILT_CODE else float(cell.digital_tilt)
    return float(cell.mechanical_downtilt) + digital


def vertical_beamwidth(cell: RadioCell) -> float | None:
    """Return the vertical beamwidth in degrees that the prompt's table gives for the cell's beam scenario, or None."""
    if cell.beam_scenario is None:
        return None
    name = cell.beam_scenario.upper()
    if name == "DEFAULT":
        return 6.0
    matched = _SCENARIO.fullmatch(name)
    if matched is None:
        return None
    number = int(matched[1])
    return 6.0 if number <= 5 else 12.0 if number <= 11 else 25.0


def lobe_deficit(row: DriveTestRow, cell: RadioCell) -> float | None:
    """Return by how many degrees the upper edge of a cell's beam passes below the direction of a row.

    That is ``tilt - beamwidth / 2 - elevation`` with ``elevation = atan2(height, distance)``; positive where the row
    lies beyond the reach of the beam. None where a value is missing.
    """
    meters, tilt, beamwidth = distance(row, cell), downtilt(cell), vertical_beamwidth(cell)
    if meters is None or tilt is None or beamwidth is None or cell.height is None:
        return None
    return tilt - beamwidth / 2 - math.degrees(math.atan2(cell.height, meters))


# --- the rules -----------------------------------------------------------------------------------------------------


class Situation:
    """The tables of a case as the rules look at them: which rows are affected, and which cell serves them.

    Attributes:
        case: The case.
        affected: (number of the row, row) of the affected rows.
        serving: (number of the row, row, index of its serving cell) of those whose serving cell is in the table.
    """

    __slots__ = ("affected", "case", "serving")

    def __init__(self, case: Case) -> None:
        """Work them out, once for all rules."""
        self.case = case
        self.affected = [
            (number, row)
            for number, row in enumerate(case.drive_test)
            if row.throughput is not None and row.throughput < THROUGHPUT
        ]
        indices: dict[Decimal, list[int]] = {}
        for index, cell in enumerate(case.cells):
            if cell.pci is not None:
                indices.setdefault(cell.pci, []).append(index)
        self.serving = [
            (number, row, self._nearest(row, indices[row.pci]))
            for number, row in self.affected
            if row.pci is not None and row.pci in indices
        ]

    def _nearest(self, row: DriveTestRow, indices: list[int]) -> int:
        # Two cells may have one PCI; the nearer one serves.
        if len(indices) == 1:
            return indices[0]
        distances = [distance(row, self.case.cells[index]) for index in indices]
        known = [(meters, index) for meters, index in zip(distances, indices, strict=True) if meters is not None]
        return min(known)[1] if known else indices[0]

    def deficits(self) -> Iterator[tuple[int, DriveTestRow, int, float]]:
        """Yield the entries of ``serving`` with their :func:`lobe_deficit`, where it is known."""
        for number, row, index in self.serving:
            deficit = lobe_deficit(row, self.case.cells[index])
            if deficit is not None:
                yield number, row, index, deficit

    def stations(self) -> dict[Decimal, set[str]]:
        """Return the base stations that have a cell with a PCI, by PCI."""
        stations: dict[Decimal, set[str]] = {}
        for cell in self.case.cells:
            if cell.pci is not None and cell.gnodeb_id is not None:
                stations.setdefault(cell.pci, set()).add(cell.gnodeb_id)
        return stations

    def same_residues(self) -> Iterator[tuple[int, DriveTestRow, Neighbor]]:
        """Yield (number of the row, row, neighbor) where both PCIs are equal modulo :data:`PCI_MODULUS`."""
        for number, row in self.affected:
            if row.pci is None:
                continue
            residue = row.pci % PCI_MODULUS
            for neighbor in row.neighbors:
                if neighbor.pci is not None and neighbor.pci % PCI_MODULUS == residue:
                    yield number, row, neighbor

    def overlaps(self) -> Iterator[tuple[int, DriveTestRow, Neighbor]]:
        """Yield (number of the row, row, neighbor) where the neighbor overlaps and stands elsewhere."""
        stations = self.stations()
        for number, row, index in self.serving:
            own = self.case.cells[index].gnodeb_id
            if own is None or row.rsrp is None:
                continue
            limit = row.rsrp - OVERLAP
            for neighbor in row.neighbors:
                if neighbor.pci is None or neighbor.brsrp is None or neighbor.brsrp < limit:
                    continue
                there = stations.get(neighbor.pci)
                # A neighbor that the table does not list cannot be told to stand elsewhere.
                if there and own not in there:
                    yield number, row, neighbor


def coverage_distance(situation: Situation) -> RuleResult:
    """C2: an affected row is farther from its serving cell than :data:`COVERAGE_DISTANCE`."""
    reached = [
        (meters, number, index)
        for number, row, index in situation.serving
        if (meters := distance(row, situation.case.cells[index])) is not None
    ]
    far = [entry for entry in reached if entry[0] > COVERAGE_DISTANCE]
    shown = far or reached
    return RuleResult(
        Cause.C2,
        "coverage distance",
        bool(far),
        tuple(number for _, number, _ in shown),
        tuple(dict.fromkeys(index for _, _, index in shown)),
        {"meters": max(reached)[0]} if reached else {},
        COVERAGE_DISTANCE,
        "the serving cell is {meters:.1f} m away; limit {threshold} m",
    )


def handovers(situation: Situation) -> RuleResult:
    """C5: the serving cell changes at least :data:`HANDOVERS` times in the drive test."""
    serving = [(number, row.pci) for number, row in enumerate(situation.case.drive_test) if row.pci is not None]
    changes = tuple(number for (_, before), (number, after) in pairwise(serving) if before != after)
    return RuleResult(
        Cause.C5,
        "handovers",
        len(changes) >= HANDOVERS,
        changes,
        values={"changes": len(changes)} if serving else {},
        threshold=HANDOVERS,
        template="changes of the serving PCI: {changes}; limit below {threshold}",
    )


def speed(situation: Situation) -> RuleResult:
    """C7: a row is faster than :data:`SPEED`."""
    speeds = [(row.speed, number) for number, row in enumerate(situation.case.drive_test) if row.speed is not None]
    fast = tuple(number for value, number in speeds if value > SPEED)
    return RuleResult(
        Cause.C7,
        "speed",
        bool(fast),
        fast,
        values={"speed": float(max(speeds)[0])} if speeds else {},
        threshold=SPEED,
        template="the highest speed is {speed:g} km/h; limit {threshold} km/h",
    )


def resource_blocks(situation: Situation) -> RuleResult:
    """C8: the mean of the scheduled resource blocks over the affected rows is below :data:`RESOURCE_BLOCKS`."""
    counts = [(number, row.rbs) for number, row in situation.affected if row.rbs is not None]
    mean = float(sum(value for _, value in counts) / len(counts)) if counts else math.inf
    return RuleResult(
        Cause.C8,
        "resource blocks",
        mean < RESOURCE_BLOCKS,
        tuple(number for number, _ in counts),
        values={"mean": mean} if counts else {},
        threshold=RESOURCE_BLOCKS,
        template="the affected rows have {mean:.2f} resource blocks on average; limit {threshold}",
    )


def weak_coverage(situation: Situation) -> RuleResult:
    """C1, first rung: on an affected row the beam passes below it and RSRP is at most :data:`WEAK_RSRP`."""
    seen = [
        (deficit, number, index, row.rsrp)
        for number, row, index, deficit in situation.deficits()
        if row.rsrp is not None
    ]
    weak = [entry for entry in seen if entry[0] > 0 and entry[3] <= WEAK_RSRP]
    shown = weak or seen
    worst = max(shown, key=lambda entry: entry[0]) if shown else None
    return RuleResult(
        Cause.C1,
        "weak coverage under a steep beam",
        bool(weak),
        tuple(entry[1] for entry in shown),
        tuple(dict.fromkeys(entry[2] for entry in shown)),
        {} if worst is None else {"deficit": worst[0], "rsrp": float(worst[3])},
        WEAK_RSRP,
        "tilt minus half of the beamwidth minus elevation is {deficit:.2f}° where RSRP is {rsrp:g} dBm; limit 0° at "
        "{threshold} dBm or less",
    )


def pci_mod_30(situation: Situation) -> RuleResult:
    """C6: in more than :data:`PCI_PAIRS` pairs of an affected row and a neighbor, both PCIs are equal modulo 30."""
    pairs = [(number, neighbor.pci) for number, _, neighbor in situation.same_residues()]
    pcis = {pci for _, pci in pairs}
    return RuleResult(
        Cause.C6,
        "PCI mod 30",
        len(pairs) > PCI_PAIRS,
        tuple(dict.fromkeys(number for number, _ in pairs)),
        tuple(index for index, cell in enumerate(situation.case.cells) if cell.pci in pcis) if pcis else (),
        {"pairs": len(pairs)} if any(row.pci is not None for _, row in situation.affected) else {},
        PCI_PAIRS,
        "pairs of an affected row and a neighbor with the serving cell's PCI modulo 30: {pairs}; limit {threshold}",
    )


def overlapping_coverage(situation: Situation) -> RuleResult:
    """C4: more than :data:`OVERLAP_PAIRS` non-colocated neighbors of affected rows are within :data:`OVERLAP` dB."""
    pairs = [(number, neighbor.pci) for number, _, neighbor in situation.overlaps()]
    seen = any(
        row.rsrp is not None and situation.case.cells[index].gnodeb_id is not None
        for _, row, index in situation.serving
    )
    pcis = {pci for _, pci in pairs}
    return RuleResult(
        Cause.C4,
        "overlapping coverage",
        len(pairs) > OVERLAP_PAIRS,
        tuple(dict.fromkeys(number for number, _ in pairs)),
        tuple(index for index, cell in enumerate(situation.case.cells) if cell.pci in pcis) if pcis else (),
        {"pairs": len(pairs), "decibels": OVERLAP} if seen else {},
        OVERLAP_PAIRS,
        "neighbors of affected rows that stand elsewhere and are at most {decibels} dB weaker than the serving cell: "
        "{pairs}; limit {threshold}",
    )


def steep_beam(situation: Situation) -> RuleResult:
    """C1, second rung: the beam passes more than :data:`LOBE_DEFICIT` degrees below an affected row."""
    seen = [(deficit, number, index) for number, _, index, deficit in situation.deficits()]
    steep = [entry for entry in seen if entry[0] > LOBE_DEFICIT]
    shown = steep or seen
    return RuleResult(
        Cause.C1,
        "steep beam",
        bool(steep),
        tuple(entry[1] for entry in shown),
        tuple(dict.fromkeys(entry[2] for entry in shown)),
        {"deficit": max(seen)[0]} if seen else {},
        LOBE_DEFICIT,
        "tilt minus half of the beamwidth minus elevation is {deficit:.2f}° at most; limit {threshold}°",
    )


def better_neighbor(situation: Situation) -> RuleResult:
    """C3: what is left when no other rule holds."""
    return RuleResult(
        Cause.C3,
        "a neighbor would serve better",
        True,
        tuple(number for number, _ in situation.affected),
        template="no rule of another option holds",
    )


#: The rungs, in the order in which they are tried.
LADDER: Final[tuple[Callable[[Situation], RuleResult], ...]] = (
    coverage_distance,
    handovers,
    speed,
    resource_blocks,
    weak_coverage,
    pci_mod_30,
    overlapping_coverage,
    steep_beam,
    better_neighbor,
)


def diagnose(case: Case) -> Diagnosis:
    """Find the root cause of a case.

    Args:
        case: The case.

    Returns:
        The first rule that holds among those whose cause is on offer, with the results of all rules up to it. A rule
        that holds for a cause that is not on offer is among the results, and the next rule is tried.
    """
    situation = Situation(case)
    labels = {option.cause: option.label for option in case.options}
    results: list[RuleResult] = []
    for rule in LADDER:
        result = rule(situation)
        results.append(result)
        if result.holds and result.cause in labels:
            return Diagnosis(labels[result.cause], result.cause, result, tuple(results))
    return Diagnosis(None, None, None, tuple(results))
