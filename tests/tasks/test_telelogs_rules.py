"""The diagnostic ladder: every threshold from both sides, the order of the rungs, the evidence, and what is missing.

The cases here stand on the equator, where degrees are easy to convert, and most antennas have height 0: their
elevation is 0, so that the lobe deficit is tilt minus half of the beamwidth, a number to read off.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpo_plugin.tasks.telelogs import rules
from hpo_plugin.tasks.telelogs.prompts import WORDINGS, parse_prompt, render_prompt
from hpo_plugin.tasks.telelogs.rules import (
    LADDER,
    Diagnosis,
    RuleResult,
    Situation,
    diagnose,
    distance,
    downtilt,
    lobe_deficit,
    vertical_beamwidth,
)
from hpo_plugin.tasks.telelogs.synthetic import SyntheticRow, generate, relabeled
from hpo_plugin.tasks.telelogs.tables import (
    STANDARD_OPTIONS,
    Case,
    Cause,
    DriveTestRow,
    Neighbor,
    Option,
    RadioCell,
    Value,
)
from hpo_plugin.tasks.telelogs.variants import REDUCTIONS

Number = str | int | None


def decimal(value: Number) -> Value:
    return None if value is None else Decimal(value)


def cell(pci: Number = 100, station: str | None = "home", **changes: Any) -> RadioCell:
    """An antenna at 0° 0°, height 0, tilt 2° and beamwidth 6°: its lobe deficit is -1°."""
    values: dict[str, Any] = {
        "longitude": 0,
        "latitude": 0,
        "mechanical_azimuth": 0,
        "mechanical_downtilt": 2,
        "digital_tilt": 0,
        "digital_azimuth": 0,
        "height": 0,
        "max_transmit_power": 30,
    }
    texts = {"cell_id": "1", "beam_scenario": "DEFAULT", "txrx_mode": None, "antenna_model": None}
    texts |= {name: changes.pop(name) for name in tuple(changes) if name in texts}
    values |= changes
    return RadioCell(
        gnodeb_id=station, pci=decimal(pci), **texts, **{name: decimal(value) for name, value in values.items()}
    )


def row(throughput: Number = 500, *, pci: Number = 100, **changes: Any) -> DriveTestRow:
    """A second at 0.001° 0° (111 m from the antenna) in which nothing but throughput is wrong."""
    pairs = changes.pop("neighbors", [(201, -95), (302, -99)])
    values: dict[str, Any] = {"longitude": "0.001", "latitude": 0, "speed": 30, "rsrp": -80, "sinr": 10, "rbs": 180}
    values |= changes
    return DriveTestRow(
        timestamp=None,
        throughput=decimal(throughput),
        pci=decimal(pci),
        neighbors=tuple(Neighbor(decimal(neighbor), decimal(brsrp)) for neighbor, brsrp in pairs),
        **{name: decimal(value) for name, value in values.items()},
    )


#: 201 is a cell of another station; 101 is colocated with 100; 302 is not in the table.
CELLS = (cell(), cell(101), cell(201, "other", longitude="0.003"))


def case(
    drive_test: Iterable[DriveTestRow], cells: Iterable[RadioCell] = CELLS, options: Any = STANDARD_OPTIONS
) -> Case:
    return Case(tuple(drive_test), tuple(cells), tuple(options))


def four(**changes: Any) -> list[DriveTestRow]:
    """Four affected rows between two that are not."""
    return [row(900), *[row(**changes) for _ in range(4)], row(900)]


def finding(rule: Callable[[Situation], RuleResult], of: Case) -> RuleResult:
    return rule(Situation(of))


def cause_of(of: Case) -> Cause | None:
    return diagnose(of).cause


@pytest.fixture(scope="module")
def generated() -> list[SyntheticRow]:
    return list(generate(48, seed=11).rows)


def test_where_nothing_else_is_wrong_it_is_a_better_neighbor() -> None:
    found = diagnose(case(four()))
    assert (found.label, found.cause) == ("C3", Cause.C3)
    assert [finding.holds for finding in found.results] == [False] * 8 + [True]
    assert found.evidence is found.results[-1]
    assert found.evidence.rows == (1, 2, 3, 4)


# --- affected rows: 600 Mbps ---


def test_a_row_is_affected_below_600() -> None:
    rows = [row("599.99"), row(600), row("600.01"), row(None), row(0), row("-0.0")]
    assert [number for number, _ in Situation(case(rows)).affected] == [0, 4, 5]


@pytest.mark.parametrize(
    ("rule", "changes"),
    [
        (rules.coverage_distance, {"longitude": "0.02"}),
        (rules.resource_blocks, {"rbs": 100}),
        (rules.weak_coverage, {"pci": 7, "rsrp": -95}),
        (rules.pci_mod_30, {"neighbors": [(130, -95)]}),
        (rules.overlapping_coverage, {"neighbors": [(201, -80)]}),
        (rules.steep_beam, {"pci": 7}),
    ],
)
def test_rows_that_are_not_affected_do_not_count(
    rule: Callable[[Situation], RuleResult], changes: dict[str, Any]
) -> None:
    cells = [*CELLS, cell(7, mechanical_downtilt=9)]
    for throughput, holds in (("599.99", True), (600, False), (None, False)):
        found = finding(rule, case([row(), *[row(throughput, **changes) for _ in range(4)]], cells))
        assert found.holds is holds
        assert holds is False or found.rows[-1] == 4


def test_handovers_and_speed_are_those_of_the_whole_drive() -> None:
    rows = [row(900, pci=pci, speed=speed) for pci, speed in ((100, 30), (101, 50), (100, 30), (101, 30))]
    assert finding(rules.handovers, case(rows)).holds
    assert finding(rules.speed, case(rows)).holds
    assert cause_of(case(rows)) is Cause.C5


# --- geometry ---


def test_the_haversine_agrees_with_the_angle_between_two_vectors() -> None:
    def vector(longitude: float, latitude: float) -> tuple[float, float, float]:
        east, north = math.radians(longitude), math.radians(latitude)
        return math.cos(north) * math.cos(east), math.cos(north) * math.sin(east), math.sin(north)

    rng = random.Random(0)
    for _ in range(500):
        longitude, latitude = rng.uniform(-180, 180), rng.uniform(-89, 89)
        scale = 10 ** rng.uniform(-4, 1.5)
        place = [longitude, latitude, longitude + rng.uniform(-scale, scale), latitude + rng.uniform(-scale, scale)]
        a, b = vector(*place[:2]), vector(*place[2:])
        cross = (a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0])
        angle = math.atan2(math.hypot(*cross), sum(x * y for x, y in zip(a, b, strict=True)))
        written = [f"{value:.12f}" for value in place]
        measured = distance(
            row(longitude=written[0], latitude=written[1]), cell(longitude=written[2], latitude=written[3])
        )
        assert measured == pytest.approx(6_371_000 * angle, rel=1e-6)


def test_distances_known_by_heart() -> None:
    # A degree of a great circle is 111.195 km; at 60° of latitude a degree of longitude is half of one.
    assert distance(row(longitude=1, latitude=0), cell()) == pytest.approx(111_194.93, abs=0.01)
    assert distance(row(longitude=0, latitude=1), cell()) == pytest.approx(111_194.93, abs=0.01)
    assert distance(row(longitude=10, latitude=60), cell(longitude="10.01", latitude=60)) == pytest.approx(
        555.97, abs=0.01
    )
    assert distance(row(longitude=180, latitude=0), cell()) == pytest.approx(math.pi * 6_371_000)
    assert distance(row(longitude="179.999"), cell(longitude="-179.999")) == pytest.approx(222.39, abs=0.01)
    assert distance(row(longitude=5, latitude=50), cell(longitude=5, latitude=50)) == 0


def test_no_position_stops_the_haversine() -> None:
    """Rounding must not take the root or the arc sine out of its domain, on any sphere or beyond its poles."""
    rng = random.Random(1)
    for _ in range(2000):
        latitude = Decimal(f"{rng.uniform(-180, 180):.6f}")
        here = row(longitude=f"{rng.uniform(-180, 180):.6f}", latitude=str(latitude))
        assert here.longitude is not None
        across = str(here.longitude + 180)
        for there in (
            cell(longitude=across, latitude=str(-latitude)),
            cell(longitude=across, latitude=str(180 - latitude)),
        ):
            meters = distance(here, there)
            assert meters is not None
            assert 0 <= meters <= math.pi * 6_371_000 + 1


@pytest.mark.parametrize("name", ["longitude", "latitude"])
def test_without_a_position_there_is_no_distance(name: str) -> None:
    assert distance(row(**{name: None}), cell()) is None
    assert distance(row(), cell(**{name: None})) is None


@pytest.mark.parametrize(
    ("mechanical", "digital", "tilt"),
    [(3, 255, 9), (3, "255.0", 9), (3, 254, 257), (3, 6, 9), (3, 0, 3), (-2, 9, 7), ("0.5", "1.25", 1.75), (0, 255, 6)],
)
def test_downtilt_is_mechanical_plus_digital_where_255_means_6(
    mechanical: Number, digital: Number, tilt: float
) -> None:
    assert downtilt(cell(mechanical_downtilt=mechanical, digital_tilt=digital)) == tilt


def test_without_a_tilt_there_is_no_downtilt() -> None:
    assert downtilt(cell(mechanical_downtilt=None)) is None
    assert downtilt(cell(digital_tilt=None)) is None


@pytest.mark.parametrize(
    ("scenario", "degrees"),
    [
        ("DEFAULT", 6),
        ("Default", 6),
        ("default", 6),
        *[(f"SCENARIO_{number}", 6) for number in range(1, 6)],
        *[(f"SCENARIO_{number}", 12) for number in range(6, 12)],
        *[(f"SCENARIO_{number}", 25) for number in (12, 13, 16, 20, 99, 100)],
        ("Scenario_7", 12),
        *[
            (name, None)
            for name in (
                "SCENARIO_0",
                "SCENARIO_",
                "SCENARIO",
                "SCENARIO_-1",
                "SCENARIO_1.5",
                "SCENARIO_01",
                "SCENARIO_²",
                "SCENARIO_٣",
                "SCENARIO 3",
                "SCENARIO_3 ",
                "SCENARIO_3_4",
                "DEFAULT_",
                "DEFAULT_1",
                "OTHER_3",
                "12",
                "",
                None,
                "SCENARIO_" + "9" * 5000,
            )
        ],
    ],
)
def test_the_beam_scenario_decides_the_beamwidth(scenario: str | None, degrees: float | None) -> None:
    assert vertical_beamwidth(cell(beam_scenario=scenario)) == degrees


def test_the_lobe_deficit_is_tilt_minus_half_of_the_beamwidth_minus_elevation() -> None:
    # 100 m high and 1000.75 m away (0.009°): atan(100 / 1000.75) = 5.7063°.
    antenna = cell(height=100, mechanical_downtilt=3, digital_tilt=9, beam_scenario="SCENARIO_8")
    assert lobe_deficit(row(longitude="0.009"), antenna) == pytest.approx(12 - 6 - 5.7063, abs=1e-4)
    # As high as it is far: 45°. At its foot: 90°.
    assert lobe_deficit(row(longitude="0.009"), replace(antenna, height=Decimal("1000.7543"))) == pytest.approx(
        6 - 45, abs=1e-4
    )
    assert lobe_deficit(row(longitude=0), antenna) == 6 - 90
    # Height 0: what the other tests read off.
    assert lobe_deficit(row(), cell()) == -1


@pytest.mark.parametrize("name", ["longitude", "mechanical_downtilt", "digital_tilt", "beam_scenario", "height"])
def test_without_a_value_there_is_no_lobe_deficit(name: str) -> None:
    assert lobe_deficit(row(), cell(**{name: None})) is None


# --- the serving cell ---


def test_of_two_cells_with_one_pci_the_nearer_serves() -> None:
    near, far = cell(longitude="0.002"), cell(longitude="0.5")
    for cells, index in (((near, far), 0), ((far, near), 1), ((CELLS[1], far, near), 2)):
        found = finding(rules.coverage_distance, case([row()], cells))
        assert not found.holds
        assert found.cells == (index,)


def test_a_cell_at_the_very_place_of_the_row_serves() -> None:
    """Its distance is 0, which is not the same as unknown."""
    here, far = cell(longitude="0.001"), cell(longitude="0.5")
    for cells in ((here, far), (far, here)):
        assert Situation(case([row()], cells)).serving[0][2] == cells.index(here)
        assert cause_of(case([row()], cells)) is Cause.C3


def test_each_row_has_its_own_nearest_cell() -> None:
    cells = (cell(longitude=0), cell(longitude=1))
    rows = [row(longitude="0.001"), row(longitude="0.999"), row(longitude="0.002")]
    assert [index for _, _, index in Situation(case(rows, cells)).serving] == [0, 1, 0]


def test_of_two_cells_the_one_with_a_position_serves_and_without_any_the_first() -> None:
    lost = cell(longitude=None)
    assert Situation(case([row()], [lost, cell()])).serving[0][2] == 1
    assert Situation(case([row()], [cell(), lost])).serving[0][2] == 0
    assert Situation(case([row()], [lost, lost])).serving[0][2] == 0
    assert Situation(case([row(latitude=None)], [cell(), cell()])).serving[0][2] == 0


def test_a_pci_is_a_number_however_it_is_written() -> None:
    assert Situation(case([row(pci="100.0")])).serving[0][2] == 0


def test_a_row_whose_cell_is_not_in_the_table_has_no_serving_cell() -> None:
    assert Situation(case([row(pci=999), row(pci=None), row()])).serving[0][0] == 2


# --- C2: 1 km ---


def test_c2_begins_above_1000_meters() -> None:
    # 1 km is 0.0089932161° of a great circle of a sphere of 6,371 km.
    for degrees, meters, cause in (("0.00899321", "999.999", Cause.C3), ("0.00899322", "1000.000", Cause.C2)):
        for rows in (four(longitude=degrees), four(longitude=0, latitude=f"-{degrees}")):
            found = finding(rules.coverage_distance, case(rows))
            assert f"{found.values['meters']:.3f}" == meters
            assert found.holds == (cause is Cause.C2)
            assert cause_of(case(rows)) is cause


def test_c2_needs_one_row_and_its_evidence_is_the_far_ones() -> None:
    rows = [row(), row(longitude="0.01"), row(900, longitude="0.03"), row(longitude="0.02", pci=101), row()]
    found = diagnose(case(rows)).evidence
    assert found is not None
    assert (found.cause, found.rows, found.cells, found.threshold) == (Cause.C2, (1, 3), (0, 1), 1000)
    assert found.values == {"meters": pytest.approx(2223.9, abs=0.1)}
    assert found.sentence() == "the serving cell is 2223.9 m away; limit 1000 m"


# --- C5: 3 changes ---


@pytest.mark.parametrize(
    ("pcis", "changes"),
    [
        ([100] * 10, ()),
        ([100] * 5 + [101] * 5, (5,)),
        ([100, 100, 101, 101, 100, 100], (2, 4)),
        ([100, 101, 100, 101], (1, 2, 3)),
        ([100, 100, 101, 100, 100, 101, 101], (2, 3, 5)),
        ([100, 101, 201, 302, 999], (1, 2, 3, 4)),
        # A missing one is no change of its own.
        ([100, None, 100, None, 100, None, 100], ()),
        ([100, None, 101, None, 100], (2, 4)),
        ([None, 100, 101, None, None, 100, 101, None], (2, 5, 6)),
        (["100", "100.0", "100", "100.00"], ()),
    ],
)
def test_c5_begins_at_three_changes_of_the_serving_pci(pcis: list[Number], changes: tuple[int, ...]) -> None:
    found = finding(rules.handovers, case([row(900, pci=pci) for pci in pcis]))
    assert (found.rows, found.values, found.threshold) == (changes, {"changes": len(changes)}, 3)
    assert found.holds == (len(changes) >= 3)


def test_c5_says_how_many() -> None:
    rows = [row(pci=pci) for pci in (100, 101, 100, 101)]
    found = diagnose(case(rows)).evidence
    assert found is not None
    assert (found.cause, found.sentence()) == (Cause.C5, "changes of the serving PCI: 3; limit below 3")


# --- C7: 40 km/h ---


@pytest.mark.parametrize(("speed", "cause"), [(40, Cause.C3), ("40.00", Cause.C3), ("40.01", Cause.C7), (79, Cause.C7)])
def test_c7_begins_above_40(speed: Number, cause: Cause) -> None:
    assert cause_of(case([*four(), row(900, speed=speed)])) is cause
    assert cause_of(case([row(speed=speed), *four()])) is cause


def test_c7_says_where_and_how_fast() -> None:
    rows = [row(speed=39), row(speed="61.5"), row(900, speed=70), row(speed=None), row(speed=41)]
    found = diagnose(case(rows)).evidence
    assert found is not None
    assert (found.cause, found.rows, found.threshold) == (Cause.C7, (1, 2, 4), 40)
    assert found.values == {"speed": 70}
    assert found.sentence() == "the highest speed is 70 km/h; limit 40 km/h"


# --- C8: a mean of 160 ---


@pytest.mark.parametrize(
    ("counts", "cause"),
    [
        ([160], Cause.C3),
        (["160.00", 160], Cause.C3),
        ([150, 160, 170], Cause.C3),
        ([100, 220], Cause.C3),
        (["159.99"], Cause.C8),
        ([160, 160, 160, "159.96"], Cause.C8),
        # No rounding: three of these are 480 exactly, in decimals.
        (["159.9", "160.0", "160.1"], Cause.C3),
        (["0.1", "319.9"], Cause.C3),
        ([None, 170, None], Cause.C3),
        ([None, 150, 160], Cause.C8),
    ],
)
def test_c8_begins_below_a_mean_of_160(counts: list[Number], cause: Cause) -> None:
    assert cause_of(case([row(rbs=count) for count in counts])) is cause


def test_c8_takes_the_mean_of_the_affected_rows_only() -> None:
    low = [row(900, rbs=1), row(rbs=160), row(600, rbs=1)]
    assert cause_of(case(low)) is Cause.C3
    high = [row(900, rbs=900), row(rbs="159.5"), row(rbs=None), row(rbs="159.75"), row(rbs=160)]
    found = diagnose(case(high)).evidence
    assert found is not None
    assert (found.cause, found.rows, found.threshold) == (Cause.C8, (1, 3, 4), 160)
    assert found.values == {"mean": 159.75}
    assert found.sentence() == "the affected rows have 159.75 resource blocks on average; limit 160"


# --- C1, first rung: weak coverage under a steep beam ---


@pytest.mark.parametrize(
    ("rsrp", "tilt", "holds"),
    [
        (-90, 4, True),
        ("-90.00", "3.01", True),
        ("-89.99", 4, False),
        (-120, "3.01", True),
        # A deficit of 0 is not above 0.
        (-120, 3, False),
        (-120, "2.99", False),
        (-80, 9, False),
        (None, 9, False),
    ],
)
def test_weak_coverage_begins_at_minus_90_and_above_a_deficit_of_0(rsrp: Number, tilt: Number, holds: bool) -> None:
    one = case([row(), row(rsrp=rsrp)], [cell(mechanical_downtilt=tilt)])
    assert finding(rules.weak_coverage, one).holds is holds


def test_weak_coverage_and_a_steep_beam_must_meet_in_one_row() -> None:
    cells = [cell(100, mechanical_downtilt=4), cell(101, mechanical_downtilt=2)]
    apart = [row(pci=100, rsrp=-80), row(pci=101, rsrp=-95), row(900, pci=100, rsrp=-95)]
    assert not finding(rules.weak_coverage, case(apart, cells)).holds
    assert finding(rules.weak_coverage, case([*apart, row(rsrp=-90)], cells)).rows == (3,)


def test_weak_coverage_says_which_row_is_worst() -> None:
    cells = [cell(100, mechanical_downtilt=4), cell(101, mechanical_downtilt=5)]
    rows = [row(rsrp=-95), row(pci=101, rsrp="-91.50"), row(pci=101, rsrp=-80), row(rsrp="-90.25")]
    found = diagnose(case(rows, cells)).evidence
    assert found is not None
    assert (found.cause, found.rule) == (Cause.C1, "weak coverage under a steep beam")
    assert (found.rows, found.cells, found.threshold) == ((0, 1, 3), (0, 1), -90)
    assert found.values == {"deficit": 2, "rsrp": -91.5}
    assert found.sentence() == (
        "tilt minus half of the beamwidth minus elevation is 2.00° where RSRP is -91.5 dBm; limit 0° at -90 dBm or less"
    )


# --- C6: PCI modulo 30 ---


@pytest.mark.parametrize(("pairs", "cause"), [(2, Cause.C3), (3, Cause.C6), (4, Cause.C6)])
def test_c6_begins_at_three_pairs(pairs: int, cause: Cause) -> None:
    same, other = [(1000, -95), (302, -96)], [(1001, -95), (302, -96)]
    assert 1000 % 30 == 100 % 30
    rows = [row(neighbors=same if number < pairs else other) for number in range(5)]
    assert cause_of(case(rows)) is cause


@pytest.mark.parametrize(("last", "pairs"), [(10, 3), (11, 2), (100, 3), (None, 2)])
def test_pairs_of_c6_may_stand_in_one_row_at_any_place_and_strength(last: Number, pairs: int) -> None:
    together = row(neighbors=[(130, -70), (302, -95), (160, None), (None, -95), (last, -119)])
    found = finding(rules.pci_mod_30, case([together]))
    assert (found.values, found.holds) == ({"pairs": pairs}, pairs == 3)


def test_c6_says_which_rows_and_which_listed_cells() -> None:
    cells = [*CELLS, cell(131, "other"), cell(130, "other")]
    rows = [
        row(),
        row(neighbors=[(130, -95), (160, -96)]),
        row(900, neighbors=[(130, -95)]),
        row(pci=101, neighbors=[(130, -95), (131, -96)]),
        row(pci=None, neighbors=[(130, -95)]),
    ]
    found = diagnose(case(rows, cells)).evidence
    assert found is not None
    assert (found.cause, found.rows, found.cells, found.threshold) == (Cause.C6, (1, 3), (3, 4), 2)
    assert found.values == {"pairs": 3}
    assert found.sentence() == (
        "pairs of an affected row and a neighbor with the serving cell's PCI modulo 30: 3; limit 2"
    )


def test_c6_does_not_need_the_table_of_cells() -> None:
    assert cause_of(case([row(neighbors=[(130, -95)])] * 3, [])) is Cause.C6


# --- C4: overlapping coverage ---


@pytest.mark.parametrize(
    ("brsrp", "holds"), [(-83, True), ("-83.00", True), ("-83.01", False), (-80, True), (-60, True), (None, False)]
)
def test_c4_begins_at_exactly_three_decibels(brsrp: Number, holds: bool) -> None:
    rows = four(rsrp=-80, neighbors=[(201, brsrp)])
    assert cause_of(case(rows)) is (Cause.C4 if holds else Cause.C3)


def test_c4_compares_decimals_exactly() -> None:
    # In binary floating point, -61.01 - 3 is more than -64.01.
    assert -61.01 - 3 > -64.01
    found = finding(rules.overlapping_coverage, case(four(rsrp="-61.01", neighbors=[(201, "-64.01")])))
    assert found.values["pairs"] == 4


@pytest.mark.parametrize(("pairs", "cause"), [(2, Cause.C3), (3, Cause.C4), (4, Cause.C4)])
def test_c4_begins_at_three_neighbors(pairs: int, cause: Cause) -> None:
    rows = [row(neighbors=[(302, -80), (201, -81 if number < pairs else -95)]) for number in range(5)]
    assert cause_of(case(rows)) is cause
    # They may stand in one row.
    cells = [cell(), *[cell(pci, "other") for pci in (201, 202, 203, 204)]]
    together = row(neighbors=[(pci, -80) for pci in (201, 202, 203, 204)[:pairs]])
    assert cause_of(case([together], cells)) is cause


@pytest.mark.parametrize(
    ("cells", "holds"),
    [
        ([cell(), cell(201, "other")], True),
        # Colocated.
        ([cell(), cell(201, "home")], False),
        # Not in the table, or nobody knows where it stands.
        ([cell(), cell(202, "other")], False),
        ([cell(), cell(201, None)], False),
        ([cell(100, None), cell(201, "other")], False),
        ([cell(99), cell(201, "other")], False),
        # One PCI at two stations, of which one is the serving one: it may be colocated.
        ([cell(), cell(201, "other"), cell(201, "home")], False),
        ([cell(), cell(201, "other"), cell(201, "third")], True),
        ([cell(), cell(201, "other"), cell(201, None)], True),
    ],
)
def test_c4_needs_neighbors_that_stand_elsewhere(cells: list[RadioCell], holds: bool) -> None:
    rows = four(neighbors=[(201, -80)])
    assert finding(rules.overlapping_coverage, case(rows, cells)).holds is holds


def test_c4_says_which_rows_and_which_cells() -> None:
    cells = [cell(202, "third"), *CELLS]
    rows = [
        row(neighbors=[(201, -81), (101, -81)]),
        row(900, neighbors=[(201, -81)]),
        row(neighbors=[(101, -80), (201, -90)]),
        row(neighbors=[(202, -79), (201, "-82.5")]),
    ]
    found = diagnose(case(rows, cells)).evidence
    assert found is not None
    assert (found.cause, found.rows, found.cells, found.threshold) == (Cause.C4, (0, 3), (0, 3), 2)
    assert found.values == {"pairs": 3, "decibels": 3}
    assert found.sentence() == (
        "neighbors of affected rows that stand elsewhere and are at most 3 dB weaker than the serving cell: 3; limit 2"
    )


# --- C1, second rung: a steep beam ---


@pytest.mark.parametrize(("tilt", "holds"), [("5.5", False), ("5.49", False), ("5.51", True), (20, True), (3, False)])
def test_a_beam_is_steep_above_two_and_a_half_degrees(tilt: Number, holds: bool) -> None:
    one = case(four(), [cell(mechanical_downtilt=tilt)])
    assert finding(rules.steep_beam, one).values == {"deficit": float(tilt or 0) - 3}
    assert cause_of(one) is (Cause.C1 if holds else Cause.C3)


def test_a_steep_beam_says_which_rows() -> None:
    cells = [cell(mechanical_downtilt=2), cell(101, mechanical_downtilt=6), cell(7, mechanical_downtilt="7.25")]
    rows = [row(), row(pci=101), row(900, pci=7), row(pci=101), row(pci=7)]
    found = diagnose(case(rows, cells, [Option("A1", Cause.C1)])).evidence
    assert found is not None
    assert (found.cause, found.rule, found.rows, found.cells) == (Cause.C1, "steep beam", (1, 3, 4), (1, 2))
    assert (found.values, found.threshold) == ({"deficit": 4.25}, 2.5)
    assert found.sentence() == "tilt minus half of the beamwidth minus elevation is 4.25° at most; limit 2.5°"


# --- the order of the rungs ---

RUNGS = ("C2", "C5", "C7", "C8", "weak C1", "C6", "C4", "steep C1", "C3")


def staged(*rungs: str) -> Case:
    """A case in which these rungs hold, and no other but the last."""
    rsrp = -92 if "weak C1" in rungs else -80
    tilt = 8 if "steep C1" in rungs else 4 if "weak C1" in rungs else 2
    cells = [
        cell(100, mechanical_downtilt=tilt),
        cell(101, mechanical_downtilt=tilt),
        cell(201, "other", longitude="0.003", mechanical_downtilt=tilt),
    ]
    rows = []
    for number in range(6):
        pci = 100 + number % 2 if "C5" in rungs else 100
        rows.append(
            row(
                500 if 0 < number < 5 else 900,
                pci=pci,
                rsrp=rsrp,
                longitude="0.02" if "C2" in rungs else "0.001",
                speed=60 if "C7" in rungs else 30,
                rbs=100 if "C8" in rungs else 180,
                neighbors=[(pci + 30 if "C6" in rungs else 302, rsrp - 9), (201, rsrp - (2 if "C4" in rungs else 11))],
            )
        )
    return case(rows, cells)


def test_each_rung_can_hold_alone() -> None:
    for number, rung in enumerate(RUNGS):
        found = diagnose(staged(rung))
        assert found.cause is Cause(rung[-2:])
        assert len(found.results) == number + 1


PAIRS = [(upper, lower) for upper in range(len(RUNGS)) for lower in range(upper + 1, len(RUNGS))]


@pytest.mark.parametrize(("upper", "lower"), PAIRS, ids=[f"{RUNGS[a]} before {RUNGS[b]}" for a, b in PAIRS])
def test_of_two_rungs_that_hold_the_upper_one_decides(upper: int, lower: int) -> None:
    # A deficit steep enough for the lower rung of C1 is enough for the upper one where coverage is weak, too.
    both = staged(RUNGS[upper], RUNGS[lower])
    situation = Situation(both)
    assert LADDER[upper](situation).holds
    assert LADDER[lower](situation).holds
    found = diagnose(both)
    assert found.cause is Cause(RUNGS[upper][-2:])
    assert len(found.results) == upper + 1
    assert [rung.holds for rung in found.results] == [False] * upper + [True]


def test_the_ladder_is_in_the_order_of_the_data_set() -> None:
    rungs = [rule(Situation(staged(*RUNGS))) for rule in LADDER]
    assert [rung.cause.value for rung in rungs] == ["C2", "C5", "C7", "C8", "C1", "C6", "C4", "C1", "C3"]
    assert len({rung.rule for rung in rungs}) == len(rungs)
    assert all(rung.holds for rung in rungs)


# --- options ---


@pytest.mark.parametrize("upper", range(8))
def test_a_rung_that_is_not_on_offer_is_passed(upper: int) -> None:
    cause = Cause(RUNGS[upper][-2:])
    kept = [option for option in STANDARD_OPTIONS if option.cause is not cause]
    both = replace(staged(RUNGS[upper], RUNGS[upper + 1]), options=tuple(kept))
    found = diagnose(both)
    assert found.results[upper].holds
    below = Cause(RUNGS[upper + 1][-2:])
    assert found.cause is below
    assert found.evidence is found.results[-1]
    assert len(found.results) == upper + 2


def test_where_no_option_fits_there_is_no_label() -> None:
    for options in ([], [Option("C5", Cause.C5), Option("C8", Cause.C8)]):
        found = diagnose(case(four(speed=50), options=options))
        assert found == Diagnosis(None, None, None, found.results)
        assert len(found.results) == len(LADDER)
        assert [finding.cause for finding in found.results if finding.holds] == [Cause.C7, Cause.C3]


def test_the_label_is_the_one_on_offer() -> None:
    options = [Option("C7", Cause.C2), Option("M4", Cause.C7), Option("3", Cause.C3)]
    assert diagnose(case(four(speed=50), options=options)).label == "M4"
    assert diagnose(case(four(), options=options)).label == "3"
    assert diagnose(case(four(longitude="0.02"), options=options)).label == "C7"


def test_relabeled_cases_keep_their_cause_under_the_new_label(generated: list[SyntheticRow]) -> None:
    for before, after in zip(generated, relabeled(generated, 4), strict=True):
        found = diagnose(after.case)
        assert (found.cause, found.label) == (before.cause, after.case.label_of(before.cause))
        assert found.label == after.label


# --- missing values ---


@st.composite
def with_holes(draw: st.DrawFn) -> tuple[Case, Case]:
    """A case in which some rungs hold, and the same with values and columns missing."""
    before = staged(*draw(st.lists(st.sampled_from(RUNGS), max_size=3)))
    rng = random.Random(draw(st.integers(0, 2**32)))
    share = draw(st.sampled_from([0.02, 0.1, 0.3, 1.0]))
    columns = {
        kind: set(rng.sample([field.name for field in fields(kind)], draw(st.integers(0, 2))))
        for kind in (RadioCell, DriveTestRow, Neighbor)
    }

    def holed(entry: Any) -> Any:
        dropped = {
            field.name: None
            for field in fields(entry)
            if field.name != "neighbors" and (field.name in columns[type(entry)] or rng.random() < share / 2)
        }
        if isinstance(entry, DriveTestRow):
            dropped["neighbors"] = tuple(holed(neighbor) for neighbor in entry.neighbors if rng.random() > share / 4)  # type: ignore[assignment]
        return replace(entry, **dropped)

    cells = [holed(entry) for entry in before.cells if rng.random() > share / 4]
    return before, case([holed(entry) for entry in before.drive_test if rng.random() > share / 8], cells)


@given(with_holes())
@settings(max_examples=300, deadline=None)
def test_what_is_missing_never_counts_toward_a_rule_and_never_raises(cases: tuple[Case, Case]) -> None:
    before, after = cases
    for rule in LADDER:
        found = finding(rule, after)
        # The mean of fewer resource blocks may well be lower.
        if rule is not rules.resource_blocks:
            assert not found.holds or finding(rule, before).holds
        assert all(0 <= number < len(after.drive_test) for number in found.rows)
        assert all(0 <= index < len(after.cells) for index in found.cells)
        assert found.values or not found.holds or found.threshold is None
        assert_reads_well(found.sentence())
    assert diagnose(after).cause is not None


@pytest.mark.parametrize("name", [field.name for field in fields(DriveTestRow) if field.name != "neighbors"])
def test_a_missing_column_of_the_drive_test_holds_nothing(name: str) -> None:
    rows = [replace(entry, **{name: None}) for entry in staged(*RUNGS).drive_test]
    holding = {found.rule for found in (finding(rule, case(rows)) for rule in LADDER) if found.holds}
    needs = {
        "longitude": {"coverage distance", "weak coverage under a steep beam", "steep beam"},
        "latitude": {"coverage distance", "weak coverage under a steep beam", "steep beam"},
        "speed": {"speed"},
        "rbs": {"resource blocks"},
        "rsrp": {"weak coverage under a steep beam", "overlapping coverage"},
    }
    assert not holding & needs.get(name, set())
    if name == "throughput":
        assert holding == {"handovers", "speed", "a neighbor would serve better"}
    if name == "pci":
        assert holding == {"speed", "resource blocks", "a neighbor would serve better"}


@pytest.mark.parametrize("name", ["pci", "throughput"])
def test_a_rule_without_a_row_to_judge_says_so_and_counts_nothing(name: str) -> None:
    rows = [replace(entry, **{name: None}) for entry in staged(*RUNGS).drive_test]
    for rule in (rules.coverage_distance, rules.pci_mod_30, rules.overlapping_coverage, rules.steep_beam):
        found = finding(rule, case(rows))
        assert (found.values, found.rows, found.cells) == ({}, (), ())
        assert found.sentence() == "there is no row that this rule can judge"


def test_what_remains_is_said_of_the_options_because_other_rules_may_hold() -> None:
    found = diagnose(case(four(speed=50), options=[Option("C3", Cause.C3)]))
    assert found.evidence is not None
    assert found.evidence.sentence() == "no rule of another option holds"


def test_an_empty_case_is_diagnosed() -> None:
    found = diagnose(case([], []))
    assert found.cause is Cause.C3
    assert [entry.sentence() for entry in found.results[:-1]] == ["there is no row that this rule can judge"] * 8


def assert_reads_well(sentence: str) -> None:
    assert sentence
    assert sentence == sentence.strip()
    assert not any(bad in sentence for bad in ("{", "}", "inf", "nan", "None", "Decimal", "e+", "  "))


def test_every_sentence_reads_well(generated: list[SyntheticRow]) -> None:
    for rung in (*generated, *relabeled(generated, 2)):
        for found in diagnose(rung.case).results:
            assert_reads_well(found.sentence())
    for rungs in RUNGS:
        for found in diagnose(staged(rungs)).results:
            assert_reads_well(found.sentence())
            assert found.sentence() != "there is no row that this rule can judge"


def test_a_small_deficit_is_not_rounded_to_its_limit() -> None:
    weak = case([row(rsrp=-95)], [cell(mechanical_downtilt="3.02")])
    assert "is 0.02° where" in finding(rules.weak_coverage, weak).sentence()
    steep = case([row()], [cell(mechanical_downtilt="5.51")])
    assert "is 2.51° at most" in finding(rules.steep_beam, steep).sentence()


# --- another implementation, and cases made by the generator ---


def reference(prompt: str) -> str:
    """The ladder as the design notes state it, over the text of a full prompt, in floats; independent of the code."""
    names = WORDINGS["full"]
    blocks = [block for block in prompt.split("\n\n") if "|" in block]
    tables = [[line.split("|") for line in block.strip().split("\n")] for block in blocks]

    def read(table: list[list[str]], columns: dict[str, str]) -> list[dict[str, Any]]:
        fields_of = {name: field for field, name in columns.items()}
        return [
            {
                fields_of[name]: text
                if fields_of[name].endswith(("_id", "scenario", "stamp", "mode", "model"))
                else None
                if text == "-"
                else float(text)
                for name, text in zip(table[0], line, strict=True)
            }
            for line in table[1:]
        ]

    if "Timestamp" not in tables[0][0]:
        tables.reverse()
    drive, cells = read(tables[0], names.drive_test_names), read(tables[1], names.cell_names)
    slow = [entry for entry in drive if entry["throughput"] < 600]

    def meters(entry: dict[str, Any], site: dict[str, Any]) -> float:
        # On the tangent plane, which is good to a part in a million at these distances.
        scale = math.cos(math.radians((entry["latitude"] + site["latitude"]) / 2))
        east = math.radians(site["longitude"] - entry["longitude"]) * scale
        return 6_371_000 * math.hypot(east, math.radians(site["latitude"] - entry["latitude"]))

    def serving(entry: dict[str, Any]) -> dict[str, Any] | None:
        same = [site for site in cells if site["pci"] == entry["pci"]]
        return min(same, key=lambda site: meters(entry, site), default=None)

    served = [(entry, site) for entry in slow if (site := serving(entry)) is not None]
    if any(meters(entry, site) > 1000 for entry, site in served):
        return "C2"
    if sum(drive[k]["pci"] != drive[k + 1]["pci"] for k in range(len(drive) - 1)) >= 3:
        return "C5"
    if max(entry["speed"] for entry in drive) > 40:
        return "C7"
    if slow and sum(entry["rbs"] for entry in slow) / len(slow) < 160:
        return "C8"

    def deficit(entry: dict[str, Any], site: dict[str, Any]) -> float:
        scenario = site["beam_scenario"]
        number = 0 if scenario == "DEFAULT" else int(scenario.split("_")[1])
        width = 6 if number <= 5 else 12 if number <= 11 else 25
        tilt = site["mechanical_downtilt"] + (6 if site["digital_tilt"] == 255 else site["digital_tilt"])
        return float(tilt - width / 2 - math.degrees(math.atan2(site["height"], meters(entry, site))))

    if any(deficit(entry, site) > 0 and entry["rsrp"] <= -90 for entry, site in served):
        return "C1"

    def neighbors(entry: dict[str, Any]) -> list[tuple[float, float]]:
        pairs = [(entry[f"neighbor_{k}_pci"], entry[f"neighbor_{k}_brsrp"]) for k in range(1, 6)]
        return [(pci, brsrp) for pci, brsrp in pairs if pci is not None and brsrp is not None]

    if sum(pci % 30 == entry["pci"] % 30 for entry in slow for pci, _ in neighbors(entry)) > 2:
        return "C6"
    station = {site["pci"]: site["gnodeb_id"] for site in cells}
    close = [
        pci
        for entry, site in served
        for pci, brsrp in neighbors(entry)
        if station.get(pci, site["gnodeb_id"]) != site["gnodeb_id"] and brsrp - entry["rsrp"] >= -3 - 1e-9
    ]
    if len(close) > 2:
        return "C4"
    return "C1" if any(deficit(entry, site) > 2.5 for entry, site in served) else "C3"


def test_the_ladder_agrees_with_a_plain_one_over_the_text(generated: list[SyntheticRow]) -> None:
    for made in (*generated, *relabeled(generated, 8)):
        kept = replace(made.case, options=STANDARD_OPTIONS)
        assert diagnose(kept).cause is made.cause
        assert reference(render_prompt(kept)) == made.cause.value


def test_the_ladder_agrees_with_a_plain_one_on_mixtures(generated: list[SyntheticRow]) -> None:
    """Rows of one case with cells and values of another hold more than one rule, or none."""
    rng = random.Random(2)
    found = []
    for _ in range(150):
        first, second = (entry.case for entry in rng.sample(generated, 2))
        rows = [
            replace(
                here,
                speed=there.speed if rng.random() < 0.1 else here.speed,
                rbs=there.rbs if rng.random() < 0.5 else here.rbs,
                rsrp=there.rsrp,
                throughput=there.throughput,
                neighbors=here.neighbors if rng.random() < 0.5 else there.neighbors,
            )
            for here, there in zip(first.drive_test, second.drive_test, strict=True)
        ]
        cells = [
            replace(
                site, pci=other.pci if rng.random() < 0.2 else site.pci, mechanical_downtilt=Decimal(rng.randrange(20))
            )
            for site, other in zip(first.cells, rng.choices(second.cells, k=len(first.cells)), strict=True)
        ]
        # PCIs in the table once each: which station a PCI stands for is then the same to both.
        unique = list({site.pci: site for site in cells}.values())
        mixed = case(rows, unique)
        found.append(reference(render_prompt(mixed)))
        assert cause_of(mixed) is Cause(found[-1])
    assert len(set(found)) >= 7


def test_an_unreduced_and_a_reduced_case_have_one_cause() -> None:
    for made in generate(15, seed=12, reduction=REDUCTIONS["laptop"]).rows:
        assert cause_of(parse_prompt(render_prompt(made.case))) is made.cause
