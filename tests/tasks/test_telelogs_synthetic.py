"""Synthetic TeleLogs: base scenarios, what each edit changes, labels the oracle agrees with, splits that share nothing.

What is compared with the published data (quantiles, ranges, magnitudes) are numbers measured on it; its rows are not
here.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import fields, replace
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from hpo_plugin.tasks.telelogs import synthetic
from hpo_plugin.tasks.telelogs.counterfactuals import EDITS, Tables
from hpo_plugin.tasks.telelogs.leakage import Leakage, compare_splits, scenario_key
from hpo_plugin.tasks.telelogs.prompts import LABEL_PATTERN, parse_prompt, render_prompt
from hpo_plugin.tasks.telelogs.radio import BaseScenario, BaseScenarios, inverse_cdf
from hpo_plugin.tasks.telelogs.rules import LADDER, Situation, diagnose, distance, lobe_deficit
from hpo_plugin.tasks.telelogs.synthetic import (
    ATTEMPTS,
    SyntheticRow,
    SyntheticRows,
    class_counts,
    generate,
    relabeled,
)
from hpo_plugin.tasks.telelogs.tables import (
    CELL_COLUMNS,
    DRIVE_TEST_COLUMNS,
    Case,
    Cause,
    DriveTestRow,
    Neighbor,
    RadioCell,
    Value,
)
from hpo_plugin.tasks.telelogs.variants import REDUCTIONS, Reduction, reduce_case, relabel

#: The published train split, C1 to C8.
TRAIN_COUNTS = (264, 320, 330, 283, 352, 225, 349, 277)
#: Where the edits are checked.
EDITED = 300
#: Where their keys are.
KEYED = 120


@pytest.fixture(scope="module")
def bases() -> list[BaseScenario]:
    return list(itertools.islice(BaseScenarios(11), 1200))


@pytest.fixture(scope="module")
def train() -> SyntheticRows:
    return generate(2400, split="train", balance="train", seed=5)


@pytest.fixture(scope="module")
def held_out() -> SyntheticRows:
    return generate(864, split="test", seed=5)


@pytest.fixture(scope="module")
def prompts(train: SyntheticRows, held_out: SyntheticRows) -> list[tuple[SyntheticRow, str]]:
    return [(row, render_prompt(row.case)) for made in (train, held_out) for row in made.rows]


@pytest.fixture(scope="module")
def parsed(prompts: list[tuple[SyntheticRow, str]]) -> list[tuple[SyntheticRow, Case]]:
    return [(row, parse_prompt(prompt)) for row, prompt in prompts]


@pytest.fixture(scope="module")
def laptop() -> SyntheticRows:
    return generate(500, split="train", balance="train", seed=5, reduction=REDUCTIONS["laptop"])


def number(value: Value) -> Decimal:
    """A value that is not missing."""
    assert value is not None
    return value


def floats(values: Sequence[Value]) -> np.ndarray[Any, Any]:
    return np.array([float(number(value)) for value in values])


def edited(base: BaseScenario, cause: Cause, attempt: int = 0) -> Tables:
    return EDITS[cause](base, random.Random(f"{base.number}/{attempt}"))


def reported(row: DriveTestRow) -> list[Neighbor]:
    return [neighbor for neighbor in row.neighbors if neighbor.pci is not None]


def content(row: SyntheticRow) -> tuple[str, Cause, str]:
    return render_prompt(row.case), row.cause, row.scenario


# --- base scenarios ---


def test_the_stream_of_a_seed_is_one_stream(bases: list[BaseScenario]) -> None:
    assert list(itertools.islice(BaseScenarios(11), 130)) == bases[:130]
    assert [base.number for base in bases] == list(range(len(bases)))


def test_the_stream_counts_what_it_draws() -> None:
    stream = BaseScenarios(4)
    assert (stream.drawn, stream.accepted) == (0, 0)
    for returned, _ in enumerate(itertools.islice(stream, 150), start=1):
        assert returned <= stream.accepted < stream.drawn
    once = BaseScenarios(4)
    next(once)
    # Drawn in blocks of one size.
    assert stream.drawn % once.drawn == 0
    assert stream.drawn > once.drawn


def test_a_drive_is_ten_seconds_past_a_handover(bases: list[BaseScenario]) -> None:
    for base in bases:
        first, second = base.cells[base.first].pci, base.cells[base.second].pci
        h = base.handover
        assert [row.pci for row in base.drive_test] == [first] * h + [second] * (10 - h)
        assert base.dip == range(h - 2, h + 2)
        times = [datetime.strptime(str(row.timestamp), "%Y-%m-%d %H:%M:%S.%f") for row in base.drive_test]
        assert times == [times[0] + timedelta(seconds=place) for place in range(10)]
    assert set(Counter(base.handover for base in bases)) == {3, 4, 5, 6, 7}
    assert min(Counter(base.handover for base in bases).values()) > 0.15 * len(bases)


def test_the_car_moves_as_fast_as_it_says(bases: list[BaseScenario]) -> None:
    for base in bases[:EDITED]:
        for before, after in itertools.pairwise(base.drive_test):
            there = replace(base.cells[0], longitude=before.longitude, latitude=before.latitude)
            # Positions have six digits: 0.1 m.
            assert distance(after, there) == pytest.approx(float(number(after.speed)) / 3.6, abs=0.2)


def test_around_the_handover_both_cells_of_it_are_strongest_and_another_site_is_next(bases: list[BaseScenario]) -> None:
    for base in bases:
        first, second, far = (base.cells[index] for index in (base.first, base.second, base.far))
        assert first.gnodeb_id == second.gnodeb_id != far.gnodeb_id
        assert (first.longitude, first.latitude, first.height) == (second.longitude, second.latitude, second.height)
        for place in base.dip:
            row = base.drive_test[place]
            assert row.neighbors[0].pci == (second if place < base.handover else first).pci
            assert row.neighbors[1].pci == far.pci


def test_neighbors_are_two_to_five_other_cells_the_strongest_first(bases: list[BaseScenario]) -> None:
    counts: Counter[int] = Counter()
    for base in bases:
        for row in base.drive_test:
            seen = reported(row)
            counts[len(seen)] += 1
            assert len(row.neighbors) == 5
            assert all(neighbor == Neighbor(None, None) for neighbor in row.neighbors[len(seen) :])
            strengths = [number(neighbor.brsrp) for neighbor in seen]
            assert strengths == sorted(strengths, reverse=True)
            assert len({row.pci, *(neighbor.pci for neighbor in seen)}) == len(seen) + 1
    assert set(counts) == {2, 3, 4, 5}


def test_cells_are_four_to_thirteen_of_planned_pcis(bases: list[BaseScenario]) -> None:
    sizes = Counter(len(base.cells) for base in bases)
    assert set(sizes) == set(range(4, 14))
    for base in bases:
        pcis = [number(cell.pci) for cell in base.cells]
        assert all(0 <= pci <= 1007 for pci in pcis)
        assert len({pci % 30 for pci in pcis}) == len(pcis)
        assert len({(cell.gnodeb_id, cell.cell_id) for cell in base.cells}) == len(pcis)
        positions: dict[str | None, set[Any]] = {}
        for cell in base.cells:
            positions.setdefault(cell.gnodeb_id, set()).add((cell.longitude, cell.latitude, cell.height))
        assert all(len(places) == 1 for places in positions.values())
        assert 2 <= len(positions) <= 5
    # The order of the table says nothing about the handover.
    assert {(base.first < base.second, base.first < base.far) for base in bases} == set(
        itertools.product([False, True], repeat=2)
    )


def test_no_rule_could_hold_yet(bases: list[BaseScenario]) -> None:
    for base in bases:
        case = Case(base.drive_test, base.cells)
        situation = Situation(case)
        assert [place for place, _ in situation.affected] == list(base.dip)
        # And that of speed can be made to: 40 km/h more must be more than 40.
        assert max(number(row.speed) for _, row in situation.affected) > 0
        assert [rule(situation).cause for rule in LADDER if rule(situation).holds] == [Cause.C3]


@pytest.mark.parametrize(
    ("field", "low", "high", "digits"),
    [
        ("speed", 0, 39, 0),
        ("rbs", 160, 211, 2),
        ("rsrp", -90, -46, 2),
        ("sinr", -9, 39, 2),
        ("throughput", 0, 1648, 2),
    ],
)
def test_values_stay_in_the_published_ranges(
    bases: list[BaseScenario], field: str, low: float, high: float, digits: int
) -> None:
    values = [number(getattr(row, field)) for base in bases for row in base.drive_test]
    assert low <= min(values)
    assert max(values) <= high
    assert {value.as_tuple().exponent for value in values} == {-digits}
    # Zero has no sign.
    assert not any(str(value).startswith("-0") and not value for value in values)


def test_values_are_distributed_as_published(bases: list[BaseScenario]) -> None:
    rows = [row for base in bases for row in base.drive_test]
    in_dip = floats([base.drive_test[place].throughput for base in bases for place in base.dip])
    outside = floats(
        [row.throughput for base in bases for place, row in enumerate(base.drive_test) if place not in base.dip]
    )
    assert np.percentile(in_dip, [10, 50, 90]) == pytest.approx([204, 358, 483], rel=0.06)
    assert in_dip.max() < 600 <= outside.min()
    assert np.median(outside) == pytest.approx(1003, rel=0.06)
    assert np.median(floats([row.rsrp for row in rows])) == pytest.approx(-82, abs=2)
    # All of the range of speeds and resource blocks occurs.
    assert set(range(40)) == {int(number(row.speed)) for row in rows}
    blocks = floats([row.rbs for row in rows])
    assert blocks.min() < 163
    assert blocks.max() > 209
    assert np.ptp(floats([row.sinr for row in rows])) > 30


def test_an_inverse_cdf_goes_through_its_quantiles() -> None:
    quantiles = ((0.0, 1.0), (0.5, 3.0), (1.0, 7.0))
    assert inverse_cdf(quantiles, np.array([0.0, 0.25, 0.5, 0.75, 1.0])).tolist() == [1.0, 2.0, 3.0, 5.0, 7.0]


# --- physics ---


def test_received_power_falls_with_distance(bases: list[BaseScenario]) -> None:
    far, power = [], []
    for base in bases[:EDITED]:
        cells = {cell.pci: cell for cell in base.cells}
        for row in base.drive_test:
            for neighbor in reported(row):
                far.append(math.log10(distance(row, cells[neighbor.pci]) or 1))
                power.append(float(number(neighbor.brsrp)))
    slope, _ = np.polyfit(far, power, 1)
    # 39 dB a decade without antennas, and only what is strong enough is reported.
    assert -39 < slope < -10
    assert np.corrcoef(far, power)[0, 1] < -0.4


def test_the_car_leaves_one_sector_for_the_other(bases: list[BaseScenario]) -> None:
    """Before the handover A is the stronger one of the two, after it B; far from it more so than close to it."""
    ahead: dict[int, list[float]] = {}
    for base in bases:
        second = base.cells[base.second].pci
        other = {base.cells[base.first].pci, second}
        for place, row in enumerate(base.drive_test):
            for neighbor in reported(row):
                if neighbor.pci in other:
                    lead = float(number(neighbor.brsrp) - number(row.rsrp))
                    ahead.setdefault(place - base.handover, []).append(lead if neighbor.pci == second else -lead)
    means = [np.mean(ahead[place]) for place in range(-3, 4)]
    assert all(before < after for before, after in itertools.pairwise(means))
    assert means[0] < -1
    assert means[-1] > 1


def test_sinr_follows_the_neighbors_and_throughput_follows_sinr(bases: list[BaseScenario]) -> None:
    rows = [row for base in bases for row in base.drive_test]
    margin = floats([number(row.rsrp) - number(row.neighbors[0].brsrp) for row in rows])
    assert np.corrcoef(margin, floats([row.sinr for row in rows]))[0, 1] > 0.3
    for inside in (True, False):
        chosen = [row for base in bases for place, row in enumerate(base.drive_test) if (place in base.dip) is inside]
        both = np.corrcoef(floats([row.sinr for row in chosen]), floats([row.throughput for row in chosen]))
        assert both[0, 1] > 0.2


# --- the edits ---


def differing(before: Any, after: Any) -> set[str]:
    return {field.name for field in fields(before) if getattr(before, field.name) != getattr(after, field.name)}


def check_only(
    base: BaseScenario,
    tables: Tables,
    *,
    rows: Collection[int] = (),
    row_fields: Collection[str] = (),
    cells: Collection[int] = (),
    cell_fields: Collection[str] = (),
) -> Iterator[tuple[DriveTestRow, DriveTestRow]]:
    """Compare field by field: nothing but the named fields of the chosen rows and cells differs; yield those rows."""
    drive_test, edited_cells = tables
    assert len(drive_test) == len(base.drive_test)
    assert len(edited_cells) == len(base.cells)
    for index, (before, after) in enumerate(zip(base.cells, edited_cells, strict=True)):
        assert differing(before, after) <= set(cell_fields if index in cells else ()), (base.number, index)
    for place, (was, now) in enumerate(zip(base.drive_test, drive_test, strict=True)):
        assert differing(was, now) <= set(row_fields if place in rows else ()), (base.number, place)
        assert len(was.neighbors) == len(now.neighbors)
        # An edit neither adds a neighbor nor loses one.
        assert len(reported(was)) == len(reported(now))
        if place in rows:
            yield was, now


def check_lift(was: DriveTestRow, now: DriveTestRow, limit: int, low: int) -> Decimal | None:
    """The strongest neighbor comes within ``low`` to ``limit`` dB where it was weaker; return by how much it is so."""
    old, new, rsrp = number(was.neighbors[0].brsrp), number(now.neighbors[0].brsrp), number(was.rsrp)
    assert [neighbor.brsrp for neighbor in was.neighbors[1:]] == [neighbor.brsrp for neighbor in now.neighbors[1:]]
    if old >= rsrp - limit:
        assert new == old
        return None
    assert rsrp - limit <= new <= rsrp - low
    return rsrp - new


def check_uniform(drawn: Sequence[Decimal | float], low: float, high: float) -> None:
    values = np.array([float(value) for value in drawn])
    assert len(values) > 90
    width = high - low
    # The mean of so many: four standard errors.
    assert values.mean() == pytest.approx((low + high) / 2, abs=4 * width / math.sqrt(12 * len(values)))
    assert values.min() < low + 0.1 * width
    assert values.max() > high - 0.1 * width


def test_c1_weakens_what_is_before_the_handover_and_steepens_its_cell(bases: list[BaseScenario]) -> None:
    for base in bases[:EDITED]:
        tables = edited(base, Cause.C1)
        changed = check_only(
            base,
            tables,
            rows=range(base.handover),
            row_fields={"rsrp", "neighbors"},
            cells=(base.first,),
            cell_fields={"digital_tilt", "mechanical_downtilt"},
        )
        for was, now in changed:
            assert number(now.rsrp) == number(was.rsrp) - 5
            assert [(neighbor.pci, neighbor.brsrp) for neighbor in reported(now)] == [
                (neighbor.pci, number(neighbor.brsrp) - 5) for neighbor in reported(was)
            ]
        before, after = base.cells[base.first], tables[1][base.first]
        assert after.digital_tilt == 9
        assert number(after.mechanical_downtilt) >= number(before.mechanical_downtilt)
        assert number(after.mechanical_downtilt) % 1 == 0
        deficits = [lobe_deficit(tables[0][place], after) for place in base.dip if place < base.handover]
        assert max(deficit for deficit in deficits if deficit is not None) > 0


def test_c1_has_the_published_lobe_deficits(bases: list[BaseScenario]) -> None:
    deficits = []
    for base in bases:
        case = Case(*edited(base, Cause.C1))
        if diagnose(case).cause is Cause.C1:
            deficits.append(max(deficit for _, _, index, deficit in Situation(case).deficits() if index == base.first))
    # The others are drawn again.
    assert len(deficits) > 0.95 * len(bases)
    assert np.percentile(deficits, [10, 50, 90]) == pytest.approx([0.4, 5.3, 8.5], abs=0.5)


def test_c2_serves_from_another_site_that_is_moved_east(bases: list[BaseScenario]) -> None:
    shifts, bearings = [], []
    for base in bases[:EDITED]:
        tables = edited(base, Cause.C2)
        changed = check_only(
            base,
            tables,
            rows=base.dip,
            row_fields={"pci", "neighbors"},
            cells=range(len(base.cells)),
            cell_fields={"longitude", "latitude"},
        )
        for was, now in changed:
            assert now.pci == was.neighbors[1].pci == base.cells[base.far].pci
            assert [neighbor.pci for neighbor in now.neighbors] == [
                was.neighbors[0].pci,
                was.pci,
                *(neighbor.pci for neighbor in was.neighbors[2:]),
            ]
            assert [neighbor.brsrp for neighbor in now.neighbors] == [neighbor.brsrp for neighbor in was.neighbors]
        for index, (before, after) in enumerate(zip(base.cells, tables[1], strict=True)):
            east, north = (
                number(after.longitude) - number(before.longitude),
                number(after.latitude) - number(before.latitude),
            )
            if index == base.far:
                assert (east, north) == (Decimal("0.03"), 0)
                continue
            meters = distance(replace(base.drive_test[0], longitude=before.longitude, latitude=before.latitude), after)
            assert meters is not None
            shifts.append(meters)
            bearings.append((east > 0, north > 0))
        # Colocated cells stay so, but for the one that is moved away.
        stayed = {
            (cell.gnodeb_id, cell.longitude, cell.latitude) for cell in tables[1] if cell.pci != tables[1][base.far].pci
        }
        assert len(stayed) == len({cell.gnodeb_id for cell in tables[1] if cell.pci != tables[1][base.far].pci})
    # Positions have six digits: 0.1 m.
    assert min(shifts) > 12.8
    assert max(shifts) < 43.2
    check_uniform(shifts, 13, 43)
    assert min(Counter(bearings).values()) > 0.2 * len(bearings)


def test_c3_has_higher_throughput_after_the_handover_and_a_strong_neighbor(bases: list[BaseScenario]) -> None:
    lifts = []
    for base in bases:
        tables = edited(base, Cause.C3)
        changed = check_only(
            base,
            tables,
            rows=base.dip,
            row_fields={"throughput", "neighbors"},
        )
        for place, (was, now) in zip(base.dip, changed, strict=True):
            raised = place in (base.handover, base.handover + 1)
            assert number(now.throughput) == number(was.throughput) + (200 if raised else 0)
            assert [neighbor.pci for neighbor in now.neighbors] == [neighbor.pci for neighbor in was.neighbors]
            lifts.append(check_lift(was, now, limit=5, low=2))
    check_uniform([lift for lift in lifts if lift is not None], 2, 5)
    # Strong ones are left alone.
    assert None in lifts


def test_c4_has_a_neighbor_of_another_site_on_top(bases: list[BaseScenario]) -> None:
    lifts = []
    for base in bases[:EDITED]:
        changed = check_only(
            base,
            edited(base, Cause.C4),
            rows=base.dip,
            row_fields={"neighbors"},
        )
        for was, now in changed:
            assert [neighbor.pci for neighbor in now.neighbors] == [
                base.cells[base.far].pci,
                was.neighbors[0].pci,
                *(neighbor.pci for neighbor in was.neighbors[2:]),
            ]
            lifts.append(check_lift(was, now, limit=3, low=2))
    check_uniform([lift for lift in lifts if lift is not None], 2, 3)
    assert None in lifts


def test_c5_serves_by_turns(bases: list[BaseScenario]) -> None:
    for base in bases[:EDITED]:
        h = base.handover
        tables = edited(base, Cause.C5)
        changed = check_only(base, tables, rows=(h - 1, h), row_fields={"pci", "neighbors"})
        for was, now in changed:
            assert (now.pci, now.neighbors[0].pci) == (was.neighbors[0].pci, was.pci)
            assert now.neighbors[1:] == was.neighbors[1:]
            assert now.neighbors[0].brsrp == was.neighbors[0].brsrp
        a, b = base.cells[base.first].pci, base.cells[base.second].pci
        assert [tables[0][place].pci for place in base.dip] == [a, b, a, b]


def test_c6_renumbers_one_cell_everywhere(bases: list[BaseScenario]) -> None:
    lifts, steps = [], Counter[Decimal]()
    for base in bases:
        tables = edited(base, Cause.C6)
        first, second, new = (
            number(cell.pci) for cell in (base.cells[base.first], base.cells[base.second], tables[1][base.second])
        )
        steps[new - first] += 1
        assert 0 <= new <= 1007
        assert new not in {cell.pci for cell in base.cells}
        changed = check_only(
            base,
            tables,
            rows=range(10),
            row_fields={"pci", "neighbors"},
            cells=(base.second,),
            cell_fields={"pci"},
        )
        for place, (was, now) in enumerate(changed):
            for old, renumbered in ((was.pci, now.pci), *zip(pcis(was), pcis(now), strict=True)):
                assert renumbered == (new if old == second else old)
            if place in base.dip:
                lifts.append(check_lift(was, now, limit=6, low=5))
            else:
                assert [neighbor.brsrp for neighbor in now.neighbors] == [neighbor.brsrp for neighbor in was.neighbors]
    assert set(steps) == {Decimal(120), Decimal(-780)}
    check_uniform([lift for lift in lifts if lift is not None], 5, 6)
    assert None in lifts


def pcis(row: DriveTestRow) -> list[Value]:
    return [neighbor.pci for neighbor in row.neighbors]


def test_c7_is_40_faster_and_c8_has_half_of_the_blocks(bases: list[BaseScenario]) -> None:
    for base in bases[:EDITED]:
        for was, now in check_only(base, edited(base, Cause.C7), rows=base.dip, row_fields={"speed"}):
            assert number(now.speed) == number(was.speed) + 40
        for was, now in check_only(base, edited(base, Cause.C8), rows=base.dip, row_fields={"rbs"}):
            # Written with two digits.
            assert abs(number(now.rbs) - number(was.rbs) / 2) <= Decimal("0.005")
            assert number(now.rbs).as_tuple().exponent == -2


def test_an_edit_is_a_function_of_scenario_and_numbers_drawn(bases: list[BaseScenario]) -> None:
    drawing = {Cause.C1, Cause.C2, Cause.C3, Cause.C4, Cause.C6}
    for cause in Cause:
        same = [edited(base, cause) == edited(base, cause) for base in bases[:20]]
        other = [edited(base, cause) != edited(base, cause, attempt=1) for base in bases[:20]]
        assert all(same)
        assert any(other) == (cause in drawing)


# --- rows ---


def test_the_oracle_agrees_with_every_row(parsed: list[tuple[SyntheticRow, Case]]) -> None:
    for row, case in parsed:
        # Of what a model reads, not of what the generator knows.
        found = diagnose(case)
        assert found.cause is row.cause
        assert found.label == row.label == row.cause.value


def test_every_row_is_read_as_it_was_written(
    prompts: list[tuple[SyntheticRow, str]], parsed: list[tuple[SyntheticRow, Case]]
) -> None:
    for (row, prompt), (_, case) in zip(prompts, parsed, strict=True):
        assert case == row.case
        assert render_prompt(case) == prompt


def test_prompts_are_as_long_as_published_ones(prompts: list[tuple[SyntheticRow, str]]) -> None:
    lengths = [len(prompt) for _, prompt in prompts]
    assert min(lengths) == pytest.approx(4112, rel=0.02)
    assert max(lengths) == pytest.approx(4999, rel=0.02)


def test_every_cell_that_is_reported_has_engineering_parameters(prompts: list[tuple[SyntheticRow, str]]) -> None:
    """In the published C6 rows one has not, which would give the answer away."""
    for row, _ in prompts:
        listed = {cell.pci for cell in row.case.cells}
        for measured in row.case.drive_test:
            assert measured.pci in listed
            assert {neighbor.pci for neighbor in reported(measured)} <= listed


def test_the_tilt_that_c1_sets_occurs_elsewhere_too(train: SyntheticRows) -> None:
    """Else the value alone would give the answer away."""
    other = [row.case for row in train.rows if row.cause is not Cause.C1]
    steep = [case for case in other if any(cell.digital_tilt == 9 for cell in case.cells)]
    assert len(steep) > 0.2 * len(other)
    serving = [
        case for case in steep if any(case.cells[index].digital_tilt == 9 for *_, index in Situation(case).serving)
    ]
    assert len(serving) > 0.02 * len(other)


def test_classes_are_as_many_as_published(train: SyntheticRows, held_out: SyntheticRows) -> None:
    assert Counter(row.cause for row in train.rows) == dict(zip(Cause, TRAIN_COUNTS, strict=True))
    assert Counter(row.cause for row in held_out.rows) == dict.fromkeys(Cause, 108)
    # The test split is all eight of each of 108 scenarios; the train split's scenarios are as few as its classes allow.
    assert held_out.scenarios == 108
    assert set(Counter(row.scenario for row in held_out.rows).values()) == {8}
    assert train.scenarios == max(TRAIN_COUNTS)
    assert len({row.scenario for row in train.rows}) <= train.scenarios
    for made in (train, held_out):
        assert len({(row.scenario, row.cause) for row in made.rows}) == len(made.rows)


def test_rows_are_in_random_order(held_out: SyntheticRows) -> None:
    neighbors = list(itertools.pairwise(held_out.rows))
    assert sum(before.scenario == after.scenario for before, after in neighbors) < 0.03 * len(neighbors)
    assert sum(before.cause is after.cause for before, after in neighbors) < 0.2 * len(neighbors)
    assert sum(before.cause is after.cause for before, after in neighbors) > 0.06 * len(neighbors)


@pytest.mark.parametrize("size", [8, 9, 12, 100, 863, 864, 2399, 2400, 10_007])
@pytest.mark.parametrize("causes", [tuple(Cause), REDUCTIONS["laptop"].causes])
@pytest.mark.parametrize("balance", ["train", "uniform"])
def test_class_counts_are_proportional(size: int, causes: tuple[Cause, ...], balance: str) -> None:
    counts = class_counts(size, balance, causes)
    assert tuple(counts) == causes
    assert sum(counts.values()) == size
    weights = dict(zip(Cause, TRAIN_COUNTS if balance == "train" else (1,) * 8, strict=True))
    total = sum(weights[cause] for cause in causes)
    assert all(abs(counts[cause] - size * weights[cause] / total) < 1 for cause in causes)


def test_class_counts_of_the_published_sizes() -> None:
    assert tuple(class_counts(2400, "train").values()) == TRAIN_COUNTS
    assert tuple(class_counts(864, "uniform").values()) == (108,) * 8


@pytest.mark.parametrize("size", [7, 1, 0, -864])
def test_a_class_without_a_row_is_refused(size: int) -> None:
    for balance in ("train", "uniform"):
        with pytest.raises(ValueError, match=f"size={size} leaves a root cause without a row; set at least 8"):
            class_counts(size, balance)
    with pytest.raises(ValueError, match="balance='even' is not one of train, uniform"):
        class_counts(864, "even")


# --- seeds and splits ---


@pytest.mark.parametrize("reduction", [None, REDUCTIONS["laptop"]], ids=["full", "laptop"])
def test_the_same_seed_gives_the_same_rows(reduction: Reduction | None) -> None:
    for split, balance in itertools.product(("train", "test"), ("train", "uniform")):
        one, two = (generate(60, split=split, balance=balance, seed=3, reduction=reduction) for _ in range(2))
        assert one == two


def test_a_longer_split_begins_with_the_same_scenarios() -> None:
    short, long = ({content(row) for row in generate(size, seed=3).rows} for size in (80, 400))
    assert short < long


def test_every_seed_and_split_has_scenarios_of_its_own() -> None:
    seen: set[str] = set()
    texts: set[str] = set()
    for seed, split in itertools.product((0, 1, 2, 3, 2**16, 2**31 - 1), ("train", "test")):
        rows = generate(160, split=split, seed=seed).rows
        scenarios = {row.scenario for row in rows}
        assert len(scenarios) == 20
        assert not scenarios & seen
        seen |= scenarios
        prompts_of_it = {render_prompt(row.case) for row in rows}
        assert len(prompts_of_it) == 160
        assert not prompts_of_it & texts
        texts |= prompts_of_it


def test_the_splits_share_no_scenario(train: SyntheticRows, held_out: SyntheticRows) -> None:
    shared = compare_splits([row.scenario for row in train.rows], [row.scenario for row in held_out.rows])
    assert shared == Leakage(
        train_scenarios=len({row.scenario for row in train.rows}),
        test_scenarios=108,
        shared_scenarios=0,
        train_rows=0,
        test_rows=0,
    )
    # Nor anything of a scenario: no time and place of a row is in both.
    places = [
        {(r.timestamp, r.longitude, r.latitude) for row in made.rows for r in row.case.drive_test}
        for made in (train, held_out)
    ]
    assert not places[0] & places[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"split": "validation"}, "split='validation' is not one of train, test"),
        ({"balance": "even"}, "balance='even'"),
        ({"size": 7}, "size=7"),
        ({"seed": -1}, r"seed=-1 must be in \[0, 2147483647\]"),
        # numpy's seeds would repeat the scenarios of other seeds.
        ({"seed": 2**31}, r"seed=2147483648 must be in \[0, 2147483647\]"),
        ({"reduction": Reduction(rows=3)}, "rows=3"),
    ],
)
def test_invalid_arguments_are_named(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        generate(**{"size": 64, **arguments})


def test_progress_reaches_its_end() -> None:
    told: list[tuple[int, int]] = []
    generate(100, balance="train", progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert {total for _, total in told} == {100}
    assert told[-1] == (100, 100)


# --- rows drawn again ---


def base_of(number: int, seed: int = 0, split: str = "train") -> BaseScenario:
    stream = BaseScenarios(2 * seed + ("train", "test").index(split))
    return next(itertools.islice(stream, number, None))


def failing(monkeypatch: pytest.MonkeyPatch, cause: Cause, fails: Callable[[BaseScenario, int], bool]) -> list[float]:
    """Make the edit of a cause change nothing where ``fails(base, attempt)``; return what each call could draw."""
    attempts: Counter[int] = Counter()
    drawn: list[float] = []

    def edit(base: BaseScenario, rng: random.Random) -> Tables:
        attempt = attempts[base.number]
        attempts[base.number] += 1
        drawn.append(random.Random(repr(rng.getstate())).random())
        return (base.drive_test, base.cells) if fails(base, attempt) else EDITS[cause](base, rng)

    monkeypatch.setattr(synthetic, "EDITS", {**EDITS, cause: edit})
    return drawn


def test_a_row_that_the_oracle_labels_otherwise_is_drawn_again_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = generate(80)
    drawn = failing(monkeypatch, Cause.C7, lambda base, attempt: attempt < ATTEMPTS - 1)
    made = generate(80)
    assert made.redrawn == {**usual.redrawn, (Cause.C7, Cause.C3): 10 * (ATTEMPTS - 1)}
    assert made.scenarios_given_up == usual.scenarios_given_up == 0
    assert Counter(row.cause for row in made.rows) == dict.fromkeys(Cause, 10)
    # Each time with other numbers.
    assert len(set(drawn)) == len(drawn) == 10 * ATTEMPTS
    # C7 draws nothing: in the end the rows are the same.
    assert list(map(content, made.rows)) == list(map(content, usual.rows))


def test_a_scenario_that_fails_too_often_is_given_up_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = failing(monkeypatch, Cause.C7, lambda base, attempt: base.number in (0, 4))
    made = generate(80)
    assert made.scenarios_given_up == 2
    assert made.redrawn[Cause.C7, Cause.C3] == 2 * ATTEMPTS
    assert len(drawn) == 10 + 2 * ATTEMPTS
    assert made.scenarios == 10
    assert Counter(row.cause for row in made.rows) == dict.fromkeys(Cause, 10)
    # No row of it stays, not those of the causes before either.
    keys = [scenario_key(Case(base.drive_test, base.cells)) for base in map(base_of, range(12))]
    assert {row.scenario for row in made.rows} == {key for place, key in enumerate(keys) if place not in (0, 4)}


def test_a_cause_that_shows_in_no_scenario_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "SCENARIO_ATTEMPTS", 20)
    blind = Reduction(drive_test_columns=tuple(name for name in DRIVE_TEST_COLUMNS if name != "speed"))
    with pytest.raises(ValueError, match=r"none of 20 scenarios shows C7: after the reduction, the rules find C3"):
        generate(80, reduction=blind)


def test_candidates_are_counted(train: SyntheticRows) -> None:
    stream = BaseScenarios(10)
    for _ in range(train.scenarios + train.scenarios_given_up):
        next(stream)
    assert train.candidates_drawn == stream.drawn


# --- relabeled ---


@pytest.fixture(scope="module")
def changed(train: SyntheticRows) -> list[SyntheticRow]:
    return relabeled(train.rows, seed=1)


def test_relabeled_rows_keep_cause_scenario_and_tables(train: SyntheticRows, changed: list[SyntheticRow]) -> None:
    for before, after in zip(train.rows, changed, strict=True):
        assert (after.cause, after.scenario) == (before.cause, before.scenario)
        assert (after.case.drive_test, after.case.cells) == (before.case.drive_test, before.case.cells)


def test_relabeled_rows_have_valid_labels_of_one_kind(changed: list[SyntheticRow]) -> None:
    kinds: Counter[str] = Counter()
    for row in changed:
        labels = [option.label for option in row.case.options]
        causes = [option.cause for option in row.case.options]
        assert 5 <= len(labels) <= 8
        assert len(set(labels)) == len(labels)
        assert len(set(causes)) == len(causes)
        assert row.cause in causes
        assert row.case.cause_of(row.label) is row.cause
        assert all(re.fullmatch(LABEL_PATTERN, label) for label in labels)
        # A bare number names one option.
        assert len({label.lstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for label in labels}) == len(labels)
        kinds["digits" if labels[0].isdigit() else "letters"] += 1
        assert len({label.isdigit() for label in labels}) == 1
        assert row.case.layout.stated_options is None
    assert min(kinds["digits"], kinds["letters"]) > 0.45 * len(changed)
    assert set(Counter(len(row.case.options) for row in changed)) == {5, 6, 7, 8}
    cells_first = sum(row.case.layout.cells_first for row in changed)
    assert 0.45 * len(changed) < cells_first < 0.55 * len(changed)


def test_relabeled_answers_follow_no_pattern(changed: list[SyntheticRow]) -> None:
    """Neither the place of the true option nor its label says which cause it is."""
    places = Counter([option.cause for option in row.case.options].index(row.cause) for row in changed)
    assert set(places) == set(range(8))
    assert all(places[place] == pytest.approx(len(changed) * 0.15, rel=0.25) for place in range(5))
    own = sum(row.label == row.cause.value for row in changed)
    assert own < 0.02 * len(changed)


def test_relabeled_rows_are_read_and_diagnosed(changed: list[SyntheticRow]) -> None:
    for row in changed[:400]:
        prompt = render_prompt(row.case)
        assert parse_prompt(prompt) == row.case
        assert f"From the following {len(row.case.options)} potential root causes" in prompt
        assert diagnose(row.case).label == row.label


def test_relabeling_is_a_function_of_the_seed(train: SyntheticRows, changed: list[SyntheticRow]) -> None:
    assert relabeled(train.rows[:200], seed=1) == changed[:200]
    other = relabeled(train.rows[:200], seed=2)
    assert sum(one.case == two.case for one, two in zip(other, changed, strict=False)) < 5


def test_relabeling_refuses_a_row_that_the_oracle_labels_otherwise(train: SyntheticRows) -> None:
    row = train.rows[0]
    other = next(cause for cause in Cause if cause is not row.cause)
    with pytest.raises(ValueError, match=f"row 1: relabeling changed the diagnosis of {other.value}"):
        relabeled([row, replace(row, cause=other)])


def test_fewer_options_than_the_minimum_are_all_kept(laptop: SyntheticRows) -> None:
    row = laptop.rows[0]
    few = replace(row.case, options=tuple(option for option in row.case.options if option.cause is row.cause))
    assert len(relabel(few, row.cause, random.Random(0)).options) == 1
    for row in relabeled(laptop.rows):
        assert {option.cause for option in row.case.options} == set(REDUCTIONS["laptop"].causes)
        assert diagnose(parse_prompt(render_prompt(row.case))).label == row.label


# --- reduced ---


def test_a_laptop_case_is_small(laptop: SyntheticRows) -> None:
    reduction = REDUCTIONS["laptop"]
    assert Counter(row.cause for row in laptop.rows) == class_counts(500, "train", reduction.causes)
    for row in laptop.rows:
        assert len(row.case.drive_test) == 4
        assert 1 <= len(row.case.cells) <= 3
        assert len(render_prompt(row.case)) < 300
        assert row.case.layout.wording == "terse"
        assert row.case.layout.drive_test_columns == reduction.drive_test_columns
        assert row.case.layout.cell_columns == reduction.cell_columns
        assert [option.cause for option in row.case.options] == list(reduction.causes)
        shown = parse_prompt(render_prompt(row.case))
        assert shown == row.case
        assert diagnose(shown).label == row.label


@pytest.mark.parametrize(
    "reduction",
    [
        Reduction(rows=7, cells=6),
        Reduction(rows=4, cells=5),
        Reduction(wording="terse"),
        Reduction(decimals=1),
        Reduction(decimals=0, rows=5, cells=4),
        # Strength without identity, identity without strength, a later neighbor without the first.
        Reduction(
            causes=(Cause.C3, Cause.C5, Cause.C7),
            drive_test_columns=("speed", "pci", "throughput", "neighbor_1_brsrp", "neighbor_2_pci"),
            cell_columns=("pci",),
        ),
        Reduction(
            causes=(Cause.C3, Cause.C8),
            rows=6,
            drive_test_columns=("throughput", "neighbor_3_pci", "neighbor_3_brsrp", "rbs"),
        ),
        Reduction(causes=(Cause.C3, Cause.C8), drive_test_columns=("rbs", "throughput"), cell_columns=("pci",)),
    ],
)
def test_a_reduced_case_is_what_its_prompt_shows(reduction: Reduction) -> None:
    size = 12 * len(reduction.causes)
    made = generate(size, reduction=reduction)
    assert Counter(row.cause for row in made.rows) == dict.fromkeys(reduction.causes, 12)
    for row in made.rows:
        assert len(row.case.drive_test) == reduction.rows
        assert 1 <= len(row.case.cells) <= reduction.cells
        assert set(row.case.layout.drive_test_columns) == set(reduction.drive_test_columns)
        assert {option.cause for option in row.case.options} == set(reduction.causes)
        shown = parse_prompt(render_prompt(row.case))
        assert shown == row.case
        assert diagnose(shown).cause is row.cause


@pytest.mark.parametrize("decimals", [0, 1])
def test_a_reduction_rounds_what_was_measured_and_nothing_else(decimals: int, bases: list[BaseScenario]) -> None:
    unit = Decimal(1).scaleb(-decimals)
    for base in bases[:100]:
        whole = Case(base.drive_test, base.cells)
        small = reduce_case(whole, Reduction(decimals=decimals))
        assert all(cell in whole.cells for cell in small.cells)
        for before, after in zip(whole.drive_test, small.drive_test, strict=True):
            assert differing(before, after) <= {"rsrp", "sinr", "throughput", "rbs", "neighbors"}
            assert pcis(before) == pcis(after)
            pairs = [(getattr(before, name), getattr(after, name)) for name in ("rsrp", "sinr", "throughput", "rbs")]
            pairs += [(one.brsrp, two.brsrp) for one, two in zip(reported(before), reported(after), strict=True)]
            for exact, rounded in pairs:
                assert abs(number(exact) - number(rounded)) <= unit / 2
                assert number(rounded).as_tuple().exponent == -decimals
                assert rounded or not str(rounded).startswith("-")


def test_reducing_keeps_the_dip_and_the_cells_that_matter(bases: list[BaseScenario]) -> None:
    for base in bases[:100]:
        whole = Case(*edited(base, Cause.C4))
        affected = [row.timestamp for _, row in Situation(whole).affected]
        for rows, cells in itertools.product((4, 5, 6, 7, 8, 9, 10), (1, 2, 3, 13)):
            small = reduce_case(whole, Reduction(rows=rows, cells=cells))
            times = [row.timestamp for row in small.drive_test]
            all_times = [row.timestamp for row in whole.drive_test]
            begin = all_times.index(times[0])
            assert times == all_times[begin : begin + rows]
            assert set(affected) <= set(times)
            # A and B, then the neighbor that overlaps.
            wanted = [base.cells[index].pci for index in (base.first, base.second, base.far)]
            assert {cell.pci for cell in small.cells} >= set(wanted[:cells]) if rows == 4 else True
            assert len(small.cells) <= cells
            assert [cell for cell in whole.cells if cell in small.cells] == list(small.cells)


def test_the_full_reduction_changes_nothing_but_cells_that_nobody_reports(bases: list[BaseScenario]) -> None:
    for base in bases[:50]:
        whole = Case(base.drive_test, base.cells)
        seen = {row.pci for row in base.drive_test} | {pci for row in base.drive_test for pci in pcis(row)}
        kept = reduce_case(whole, REDUCTIONS["full"])
        assert kept == replace(whole, cells=tuple(cell for cell in whole.cells if cell.pci in seen))


@pytest.mark.parametrize(
    ("reduction", "said"),
    [
        (Reduction(rows=3), r"rows=3 must be in \[4, 10\]"),
        (Reduction(rows=11), r"rows=11 must be in \[4, 10\]"),
        (Reduction(cells=0), "cells=0 must be at least 1"),
        (Reduction(causes=(Cause.C1, Cause.C7)), "must contain C3"),
        (Reduction(causes=()), "must contain C3"),
        (Reduction(drive_test_columns=()), "drive_test_columns must name at least one column"),
        (Reduction(cell_columns=()), "cell_columns must name at least one column"),
        (Reduction(drive_test_columns=("speed", "velocity")), "drive_test_columns: 'velocity' is not one of"),
        (Reduction(cell_columns=("speed",)), "cell_columns: 'speed' is not one of"),
        (Reduction(wording="short"), "wording='short' is not one of full, terse"),
        (Reduction(decimals=-1), "decimals=-1 must not be negative"),
    ],
)
def test_a_reduction_that_cannot_be_is_refused(reduction: Reduction, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        reduction.validate()


def test_the_named_reductions_are_valid() -> None:
    for reduction in REDUCTIONS.values():
        reduction.validate()
    assert REDUCTIONS["full"].drive_test_columns == DRIVE_TEST_COLUMNS
    assert REDUCTIONS["full"].cell_columns == CELL_COLUMNS


# --- leakage ---


def test_all_counterfactuals_of_a_scenario_have_its_key(bases: list[BaseScenario]) -> None:
    keys = set()
    for base in bases[:KEYED]:
        key = scenario_key(Case(base.drive_test, base.cells))
        keys.add(key)
        for cause in Cause:
            case = Case(*edited(base, cause))
            assert scenario_key(case) == key
            changed = relabel(case, cause, random.Random(cause.value))
            assert scenario_key(changed) == key
            # Also of what is read from the prompt, and whatever the order of its cells.
            assert scenario_key(parse_prompt(render_prompt(replace(changed, cells=changed.cells[::-1])))) == key
    assert len(keys) == KEYED


@pytest.mark.parametrize("field", ["timestamp", "longitude", "latitude", "sinr"])
def test_a_drive_that_differs_in_one_value_is_another_scenario(bases: list[BaseScenario], field: str) -> None:
    base = bases[0]
    rows = [*base.drive_test[:-1], replace(base.drive_test[-1], **{field: getattr(base.drive_test[0], field)})]
    assert getattr(rows[0], field) != getattr(base.drive_test[-1], field)
    assert scenario_key(Case(tuple(rows), base.cells)) != scenario_key(Case(base.drive_test, base.cells))


def test_other_cells_are_another_scenario(bases: list[BaseScenario]) -> None:
    def with_cells(cells: Sequence[RadioCell]) -> str:
        return scenario_key(Case(bases[0].drive_test, tuple(cells)))

    cells = bases[0].cells
    assert len({with_cells(cells), with_cells(cells[1:]), with_cells([*cells, cells[0]])}) == 3


def test_what_splits_share_is_counted_in_scenarios_and_rows() -> None:
    assert compare_splits("aaabbbc", "bccde") == Leakage(
        train_scenarios=3, test_scenarios=4, shared_scenarios=2, train_rows=4, test_rows=3
    )
    assert compare_splits("", "ab") == Leakage(0, 2, 0, 0, 0)
    assert compare_splits(iter("ab"), iter("a")) == Leakage(2, 1, 1, 1, 1)
